"""Roll-outs from the inference service: a model server of role ``rollout``, asked over Open Inference Protocol v2.

The trainer sends the contexts it trains on, in the form that a predictor reads (docs/serving.md), so both sides compute
the same probabilities; no feature store is asked. Weights go out as a safetensors file every N steps under a name that
says the step, so every answer tells how stale it is (OneRec technical report, arXiv 2506.13695, 3.3). A server that was
restarted begins with its bundle's weights: it gets the last push again before a sample of it is used. While the server
is away the trainer waits, with growing pauses and not for ever. Left out: several servers behind one address (a push
reaches one of them), gRPC.
"""

import hashlib
import logging
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from safetensors.torch import save_file

from features.histories.context import Context
from models.generator import Generator
from models.pathways import PATHWAYS
from models.tokenizer.vocabulary import Catalogue
from models.training.device import barrier, rank
from models.training.parallel import whole
from models.training.rollouts import DrawConfig, Mode, Names, Samples

NOW_MS = 1_767_225_600_000
"""The clock of every request: contexts hold ages, so any clock will do."""
USERS_A_CALL = 32
MOST_BEAMS = 100
"""Items that a server returns of a beam search."""
TIMEOUT_S = 120.0
PAUSES_S = (0.2, 10.0)
"""The first and the longest wait between two tries."""
AWAY = (429, 502, 503, 504)
JOIN = "\x1f"

log = logging.getLogger(__name__)


class RolloutsUnavailable(RuntimeError):
    """The roll-out server stayed away; the message says where, for how long, and what to do."""


class RolloutsRefused(RuntimeError):
    """The roll-out server answers, but will not do this; the message carries its own."""


class ServerSampler:
    """A ``Sampler`` on the server at ``url``; ``token`` is the administrator's, who may push weights.

    ``patience_s`` is how long a server that is away is waited for; ``client`` replaces the connection in tests.
    """

    def __init__(
        self,
        url: str,
        token: str,
        catalogue: Catalogue,
        config: DrawConfig | None = None,
        *,
        every: int = 1000,
        name: str = "onerec",
        patience_s: float = 300.0,
        client: httpx.Client | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every is {every}; weights are pushed every 1 step or more")
        self.config = config or DrawConfig()
        self._url, self._name, self._every, self._patience_s = url, name, every, patience_s
        self._headers = {"authorization": f"Bearer {token}"}
        self._client = client or httpx.Client(base_url=url, timeout=TIMEOUT_S)
        self._names = Names(catalogue)
        self._run = uuid.uuid4().hex[:8]
        self._folder = tempfile.TemporaryDirectory(prefix="onerec-push-")
        self._push, self._step, self._pushed_at = -1, 0, 0

    def advance(self, model: Generator, step: int) -> bool:
        """See ``Sampler``; the first call always pushes. Raises RolloutsUnavailable or RolloutsRefused."""
        self._step = step
        if self._push >= 0 and step - self._pushed_at < self._every:
            return False
        state = {name: whole(value).contiguous() for name, value in model.state_dict().items()}
        self._push, self._pushed_at = self._push + 1, step
        if rank() == 0:
            save_file(state, self._file)
            self._send()
        barrier()
        return True

    def draw(self, context: Context, count: int, *, seed: int, mode: Mode = "sample") -> Samples:
        """See ``Sampler``; raises RolloutsUnavailable or RolloutsRefused, and ValueError for too wide a beam."""
        if self._push < 0:
            raise RuntimeError("nothing was pushed to the server yet; call advance(model, step) first")
        if count < 1 or (mode == "beam" and count > MOST_BEAMS):
            raise ValueError(f"{count} answers of mode {mode!r}: a server returns 1 to {MOST_BEAMS} of a beam search")
        started = time.perf_counter()
        starts = range(0, len(context), USERS_A_CALL)
        parts = [
            self._ask(context.take(slice(start, start + USERS_A_CALL)), self._parameters(count, seed + start, mode))
            for start in starts
        ]
        tokens, log_probs = (self._stacked([part[place] for part in parts], count) for place in (0, 1))
        tokens_BGL = torch.from_numpy(np.nan_to_num(tokens, nan=-1)).long()
        return Samples(
            tokens=tokens_BGL,
            log_probs=torch.from_numpy(log_probs).float(),
            items=self._names.rows(tokens_BGL),
            push=np.full(len(context), self._push),
            staleness=np.full(len(context), self._step - self._pushed_at),
            seconds=time.perf_counter() - started,
        )

    def close(self) -> None:
        """Closes the connection and removes the pushed file."""
        self._client.close()
        self._folder.cleanup()

    @property
    def version(self) -> str:
        """What the last push was called."""
        return f"{self._run}.step-{self._pushed_at}"

    @property
    def _file(self) -> Path:
        return Path(self._folder.name, "weights.safetensors")

    def _send(self) -> None:
        with self._file.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        headers = {**self._headers, "x-onerec-version": self.version, "x-onerec-sha256": digest}

        def send() -> httpx.Response:
            with self._file.open("rb") as file:
                return self._client.post(f"/onerec/models/{self._name}/weights", content=file, headers=headers)

        self._insist(send, "a push of weights")

    def _parameters(self, count: int, seed: int, mode: Mode) -> dict[str, Any]:
        chosen: dict[str, Any] = {"mode": mode, "exclude_seen": self.config.exclude_seen}
        if mode == "beam":
            return {**chosen, "beam_width": count, "num_items": count}
        drawn = {"num_samples": count, "seed": seed, "temperature": self.config.temperature}
        return {**chosen, **drawn, "constrained": self.config.constrained}

    def _ask(self, context: Context, parameters: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, log_probs) float64 [b, n, L] of the weights pushed last, NaN where a request got fewer."""
        timeout = {"timeout_ms": int(1000 * TIMEOUT_S)}
        body = {"inputs": inputs_of(context, self._names.catalogue), "parameters": {**parameters, **timeout}}
        path, deadline = f"/v2/models/{self._name}/infer", time.monotonic() + self._patience_s
        while True:
            answer = self._insist(lambda: self._client.post(path, json=body), "roll-outs").json()
            about = answer["parameters"]
            if about["model_version"] == self.version:
                return _arrays(answer)
            log.warning("the roll-out server has weights %s, not ours (%s)", about["model_version"], self.version)
            if time.monotonic() > deadline:
                raise RolloutsUnavailable(
                    f"the roll-out server at {self._url} keeps answering with weights {about['model_version']!r}, not "
                    f"{self.version!r}; give every trainer a server of its own"
                )
            if rank() == 0:
                self._send()
            time.sleep(PAUSES_S[0])

    def _insist(self, send: Callable[[], httpx.Response], what: str) -> httpx.Response:
        """The answer to ``send``, tried again with growing pauses while nobody answers."""
        deadline, pause = time.monotonic() + self._patience_s, PAUSES_S[0]
        while True:
            try:
                answer = send()
                said = _said(answer)
            except httpx.TransportError as error:
                answer, said = None, f"{type(error).__name__}: {error}"
            if answer is not None and answer.status_code < 400:
                return answer
            if answer is not None and answer.status_code not in AWAY:
                raise RolloutsRefused(
                    f"the roll-out server at {self._url} refused {what} ({said}); start it with `python -m "
                    "models.serving --role rollout --model onerec=VERSION` on the bundle trained from, and give both "
                    "sides the same ONEREC_ADMIN_TOKEN"
                )
            if time.monotonic() + pause > deadline:
                raise RolloutsUnavailable(
                    f"the roll-out server at {self._url} did not give {what} for {self._patience_s:g} s ({said}); the "
                    "last good checkpoint is kept: see that the server runs, then start this again and it resumes"
                )
            log.warning("waiting for %s from %s (%s)", what, self._url, said)
            time.sleep(pause)
            pause = min(2 * pause, PAUSES_S[1])

    def _stacked(self, parts: list[np.ndarray], count: int) -> np.ndarray:
        """All requests, exactly ``count`` answers each."""
        wide = ((0, 0), (0, 0))
        return np.concatenate(
            [np.pad(part, (wide[0], (0, count - part.shape[1]), wide[1]), constant_values=np.nan) for part in parts]
        )


def inputs_of(context: Context, catalogue: Catalogue) -> list[dict[str, Any]]:
    """The context of B requests as v2 JSON tensors, in the form that predictors read."""
    b = len(context)
    tensors: list[tuple[str, str, list[int], list[Any]]] = [
        ("static", "INT64", [b, context.static.shape[1]], context.static.ravel().tolist()),
        ("time_ms", "INT64", [b], [NOW_MS] * b),
        ("exclude", "BYTES", [b], [""] * b),
    ]
    ids = np.array(catalogue.item_ids, object)
    for name in PATHWAYS:
        part = getattr(context, name)
        known = part.item >= 0
        times = NOW_MS - np.rint(1000 * part.age_s.astype(np.float64))
        columns = [times, np.rint(part.play_ms), np.rint(part.duration_ms), part.labels]
        events = np.stack([column[known] for column in columns], -1).astype(np.int64)
        names = [JOIN.join(ids[row[there]]) for row, there in zip(part.item, known, strict=True)]
        tensors += [
            (f"{name}_items", "BYTES", [b], names),
            (f"{name}_counts", "INT64", [b], known.sum(1).tolist()),
            (f"{name}_events", "INT64", list(events.shape), events.ravel().tolist()),
        ]
    return [{"name": name, "datatype": kind, "shape": shape, "data": data} for name, kind, shape, data in tensors]


def _arrays(answer: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    outputs = {each["name"]: np.array(each["data"], np.float64).reshape(each["shape"]) for each in answer["outputs"]
               if each["name"] in ("sids", "log_probs")}  # fmt: skip
    counts = np.array([int(count) for count in answer["parameters"]["counts"].split(",")])
    absent = np.arange(outputs["sids"].shape[1]) >= counts[:, None]
    return tuple(np.where(absent[..., None], np.nan, outputs[name]) for name in ("sids", "log_probs"))  # type: ignore[return-value]


def _said(answer: httpx.Response) -> str:
    """What the server says went wrong."""
    if answer.status_code < 400:
        return ""
    try:
        return f"{answer.status_code}: {answer.json()['error']}"
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code}: {answer.text[:200]}"
