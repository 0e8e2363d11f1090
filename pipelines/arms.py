"""The arms of the loop: who answers a user's request for items. Each returns lists best first.

Two arms ask the model server (the model retrained nightly and the one frozen at day 1), the third is the
cascade baseline, run in this process and refitted each night on the same exposures. While a canary is under way the
retrained arm is two models, and a router sends a share of its users to the candidate.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

import pyarrow as pa

from features.schema import exposure_id
from models.cascade import Cascade
from monitoring.experiment import Split
from pipelines.client import Client, Served

ARMS = ("onerec", "frozen", "cascade")
MODELS = {"onerec": "onerec", "frozen": "onerec-frozen"}
CANDIDATE = "onerec-candidate"
"""The server's name for the alias ``candidate``."""


class Arm(Protocol):
    """Answers requests of users."""

    def recommend(
        self, user_ids: Sequence[str], times_ms: Sequence[int], request_ids: Sequence[str], num_items: int
    ) -> list[Served]:
        """One list of at most ``num_items`` per user."""
        ...


@dataclass(frozen=True, kw_only=True)
class ServerArm:
    """A model behind the KServe server."""

    client: Client
    model: str
    beam_width: int
    select: str = "model"

    def recommend(
        self, user_ids: Sequence[str], times_ms: Sequence[int], request_ids: Sequence[str], num_items: int
    ) -> list[Served]:
        """Asks the server over HTTP."""
        return self.client.recommend(
            self.model,
            user_ids,
            times_ms,
            request_ids,
            num_items=num_items,
            beam_width=self.beam_width,
            select=self.select,
        )


@dataclass(frozen=True, kw_only=True)
class RoutedArm:
    """Production and a candidate: ``split`` says whom the candidate answers, always the same people."""

    stable: Arm
    canary: Arm
    split: Split

    def recommend(
        self, user_ids: Sequence[str], times_ms: Sequence[int], request_ids: Sequence[str], num_items: int
    ) -> list[Served]:
        """Asks each model for its own users; answers are in the order of ``user_ids``."""
        answers: dict[int, Served] = {}
        for name, arm in (("stable", self.stable), ("canary", self.canary)):
            rows = [row for row, user in enumerate(user_ids) if self.split.arm(user) == name]
            users, requests = ([values[row] for row in rows] for values in (user_ids, request_ids))
            served = arm.recommend(users, [times_ms[row] for row in rows], requests, num_items) if rows else []
            answers |= dict(zip(rows, served, strict=True))
        return [answers[row] for row in range(len(user_ids))]


@dataclass(kw_only=True)
class CascadeArm:
    """ItemKNN recall and a gradient-boosted ranker; knows what its users saw since the last fit."""

    cascade: Cascade
    version: str = "cascade-0"
    fits: int = field(default=0)

    def recommend(
        self, user_ids: Sequence[str], times_ms: Sequence[int], request_ids: Sequence[str], num_items: int
    ) -> list[Served]:
        """Recalls and ranks in this process."""
        ranked = self.cascade.recommend(list(user_ids), max(times_ms), num_items)
        return [
            Served(
                request_id=request,
                item_ids=[item for item, _ in items],
                scores=[score for _, score in items],
                sids=[[] for _ in items],
                exposure_ids=[exposure_id(request, self.version, slot) for slot in range(len(items))],
                model_version=self.version,
                flags=[],
            )
            for request, items in zip(request_ids, ranked, strict=True)
        ]

    def refit(self, exposures: pa.Table, items: pa.Table, now: datetime) -> None:
        """Fits recall and ranker on ``exposures`` (everything known by ``now``)."""
        self.cascade = Cascade.fit(exposures, items, now_ms=int(now.timestamp() * 1000))
        self.fits += 1
        self.version = f"cascade-{self.fits}"
