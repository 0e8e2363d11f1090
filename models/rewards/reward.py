"""The reward model as a bundle carries it: P-Score, predicted stay, if trained the session reward, and item records.

``reward.safetensors`` holds the tensors; its header says the sizes and which catalogue's semantic IDs it was trained
on. A reward model of other SIDs would read every item as another one, so it is refused. Items appended since are judged
by their content, with the record of an item that was never shown. safetensors and JSON only.

Shapes: B requests, T items of each, n items when it was trained, K numbers.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.pathways import ContextTensors
from models.rewards.base import BaseConfig
from models.rewards.inputs import NUMBERS, RECORD, item_numbers, target_items
from models.rewards.pscore import OBJECTIVES, Judgement, PScore
from models.rewards.session import SessionReward
from models.rewards.stay import Stay
from models.tokenizer.vocabulary import Catalogue

REWARD = "reward.safetensors"
WATCH = OBJECTIVES.index("watch")


class RewardMismatch(ValueError):
    """A reward model belongs to another bundle; the message says how that shows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RewardModel:
    """A trained reward model, ready to judge items of its catalogue."""

    pscore: PScore
    stay: Stay | None
    """None in one that was trained before there was any."""
    session: SessionReward | None
    numbers: np.ndarray
    """float32 [n, K], ``item_numbers`` of every item."""
    sids: str
    """``sids_digest`` of the first n items."""
    metrics: dict[str, Any]

    def judge(self, context: ContextTensors, rows_BT: np.ndarray, catalogue: Catalogue) -> Judgement:
        """What users will do with the catalogue's items in ``rows_BT`` (int, -1 = padding, judged as nothing)."""
        numbers = self._numbers(rows_BT, catalogue)
        return self.pscore.judge(context, target_items(rows_BT, numbers, catalogue, context.mask.device))

    @torch.no_grad()
    def seconds(self, context: ContextTensors, rows_BT: np.ndarray, catalogue: Catalogue) -> np.ndarray:
        """float64 [B, T], for how long users will watch the items in ``rows_BT``; -1 = padding, of no meaning.

        Raises ValueError when predicted stay was not trained.
        """
        if self.stay is None:
            raise ValueError("this bundle's reward model knows no seconds; train it again")
        numbers = self._numbers(rows_BT, catalogue)
        logits, _ = self.pscore(context, target_items(rows_BT, numbers, catalogue, context.mask.device))
        watch = logits[..., WATCH].double().cpu().numpy()
        return self.stay.seconds(watch, catalogue.duration_ms[np.maximum(rows_BT, 0)])

    def judge_sessions(self, context: ContextTensors, rows_BT: np.ndarray, catalogue: Catalogue) -> Tensor:
        """``R(u, S)`` [B] of whole lists, -1 = padding; raises ValueError when no session reward was trained."""
        if self.session is None:
            raise ValueError("this bundle's reward model judges single items; train it with sessions to judge lists")
        items = target_items(rows_BT, self._numbers(rows_BT, catalogue), catalogue, context.mask.device)
        return self.session.judge(context, items, torch.from_numpy(rows_BT >= 0).to(context.mask.device))

    def check(self, catalogue: Catalogue) -> None:
        """Raises RewardMismatch unless ``catalogue`` begins with the items this was trained on."""
        n = len(self.numbers)
        if n > len(catalogue) or sids_digest(catalogue, n) != self.sids:
            raise RewardMismatch(
                f"the reward model was trained on {n} items whose SIDs have digest {self.sids[:12]}; this catalogue of "
                f"{len(catalogue)} items has {sids_digest(catalogue, min(n, len(catalogue)))[:12]}: it belongs to "
                "another bundle; train it for this one"
            )

    def to(self, device: torch.device | str) -> "RewardModel":
        """The same model on ``device`` (moved in place)."""
        self.pscore.to(device)
        if self.session is not None:
            self.session.to(device)
        return self

    def _numbers(self, rows_BT: np.ndarray, catalogue: Catalogue) -> np.ndarray:
        """[B, T, K]; an item appended since has the record of one never shown."""
        n = len(self.numbers)
        known = self.numbers[np.clip(rows_BT, 0, n - 1)]
        if rows_BT.max(initial=-1) < n:
            return known
        unshown = np.zeros((*rows_BT.shape, 1 + len(RECORD)))
        rates = self.pscore.base.get_buffer("rates").cpu().numpy()
        fresh = item_numbers(unshown, catalogue.duration_ms[np.maximum(rows_BT, 0)], rates)
        return np.where((rows_BT >= n)[..., None], fresh, known)


def sids_digest(catalogue: Catalogue, count: int) -> str:
    """sha256 of the first ``count`` items' ids and SIDs and the codebook's size."""
    digest = hashlib.sha256(f"{catalogue.codes}x{catalogue.levels}\n".encode())
    digest.update("\n".join(catalogue.item_ids[:count]).encode())
    digest.update(np.ascontiguousarray(catalogue.sids[:count]).tobytes())
    return digest.hexdigest()


def save_reward(path: Path, reward: RewardModel) -> None:
    """Writes ``reward`` as one safetensors file."""
    tensors = {f"pscore.{name}": value for name, value in reward.pscore.state_dict().items()}
    if reward.session is not None:
        tensors |= {f"session.{name}": value for name, value in reward.session.state_dict().items()}
    tensors["numbers"] = torch.from_numpy(reward.numbers)
    if reward.stay is not None:
        tensors |= {f"stay.{name}": torch.from_numpy(value) for name, value in reward.stay.arrays().items()}
    about = {"config": asdict(reward.pscore.config), "sids": reward.sids, "metrics": reward.metrics}
    about["numbers"] = list(NUMBERS)
    metadata = {"reward": json.dumps(about, sort_keys=True)}
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path, metadata)


def load_reward(path: Path, catalogue: Catalogue, device: str = "cpu") -> RewardModel:
    """The reward model at ``path``, ready to judge; raises RewardMismatch when it is not ``catalogue``'s."""
    with safe_open(path, "pt") as file:
        about: dict[str, Any] = json.loads((file.metadata() or {}).get("reward", "null")) or {}
    if about.get("numbers") != list(NUMBERS):
        raise RewardMismatch(f"{path} is no reward model of this version of the code; train it again")
    parts: dict[str, dict[str, Tensor]] = {"pscore": {}, "session": {}, "stay": {}}
    tensors = load_file(path)
    numbers = tensors.pop("numbers").numpy()
    for key, value in tensors.items():
        part, name = key.split(".", 1)
        parts[part][name] = value
    config = BaseConfig(**about["config"])
    pscore, session = PScore(config), SessionReward(config) if parts["session"] else None
    pscore.load_state_dict(parts["pscore"])
    if session is not None:
        session.load_state_dict(parts["session"])
    for each in (pscore, session) if session is not None else (pscore,):
        each.eval().requires_grad_(False)
    found = RewardModel(
        pscore=pscore,
        stay=Stay.restored({name: value.numpy() for name, value in parts["stay"].items()}) if parts["stay"] else None,
        session=session,
        numbers=numbers,
        sids=about["sids"],
        metrics=about["metrics"],
    )
    found.check(catalogue)
    return found.to(device)
