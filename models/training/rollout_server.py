"""Roll-outs from the inference service: a model server of role ``rollout``, asked over Open Inference Protocol v2.

The trainer sends the contexts it trains on, in the form that a predictor reads (docs/serving.md), so both sides compute
the same probabilities; no feature store is asked. Weights go out as a safetensors file every N steps under a name that
says the step, so every answer tells how stale it is (OneRec technical report, arXiv 2506.13695, 3.3). A server that was
restarted begins with its bundle's weights: it gets the last push again before a sample of it is used. A name that
stands for several addresses (a headless service) is several servers: all get the weights and share the requests. While
nobody answers the trainer waits, with growing pauses and not for ever. Left out: gRPC.
"""

import hashlib
import logging
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

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
    """A ``Sampler`` on the servers at ``url``; ``token`` is the administrator's, who may push weights.

    ``patience_s`` is how long servers that are away are waited for; ``connect`` opens a connection to an address.
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
        connect: Callable[[str], httpx.Client] | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every is {every}; weights are pushed every 1 step or more")
        self.config = config or DrawConfig()
        self._url, self._name, self._every, self._patience_s = url, name, every, patience_s
        self._headers = {"authorization": f"Bearer {token}"}
        self._connect = connect or (lambda address: httpx.Client(base_url=address, timeout=TIMEOUT_S))
        self._clients: dict[str, httpx.Client] = {}
        self._sent: dict[str, int] = {}
        self._sending = threading.Lock()
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
        save_file(state, self._file)  # on every worker: each may meet a server that was restarted
        if rank() == 0:
            for address in self._addresses():
                self._send(address)
        barrier()
        return True

    def draw(self, context: Context, count: int, *, seed: int, mode: Mode = "sample") -> Samples:
        """See ``Sampler``; raises RolloutsUnavailable or RolloutsRefused, and ValueError for too wide a beam."""
        if self._push < 0:
            raise RuntimeError("nothing was pushed to the server yet; call advance(model, step) first")
        if count < 1 or (mode == "beam" and count > MOST_BEAMS):
            raise ValueError(f"{count} answers of mode {mode!r}: a server returns 1 to {MOST_BEAMS} of a beam search")
        started = time.perf_counter()
        starts, addresses = range(0, len(context), USERS_A_CALL), self._addresses()

        def part(start: int) -> tuple[np.ndarray, np.ndarray]:
            chosen = self._parameters(count, seed + start, mode)
            turn = start // USERS_A_CALL % len(addresses)
            return self._ask(context.take(slice(start, start + USERS_A_CALL)), chosen, addresses[turn])

        with ThreadPoolExecutor(len(addresses)) as threads:
            parts = list(threads.map(part, starts))
        tokens, log_probs = (self._stacked([each[place] for each in parts], count) for place in (0, 1))
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
        """Closes the connections and removes the pushed file."""
        for client in self._clients.values():
            client.close()
        self._folder.cleanup()

    @property
    def version(self) -> str:
        """What the last push was called."""
        return f"{self._run}.step-{self._pushed_at}"

    @property
    def _file(self) -> Path:
        return Path(self._folder.name, "weights.safetensors")

    def _addresses(self) -> list[str]:
        """Where the servers are now; a name that cannot be resolved is left to whoever connects to it."""
        parts = urlsplit(self._url)
        if parts.scheme != "http" or parts.hostname is None:
            return [self._url]
        try:
            hosts = socket.gethostbyname_ex(parts.hostname)[2]
        except OSError:
            return [self._url]
        return sorted(f"http://{host}:{parts.port or 80}" for host in hosts)

    def _client(self, address: str) -> httpx.Client:
        if address not in self._clients:
            self._clients[address] = self._connect(address)
        return self._clients[address]

    def _send(self, address: str) -> None:
        with self._file.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        headers = {**self._headers, "x-onerec-version": self.version, "x-onerec-sha256": digest}

        def send(to: httpx.Client) -> httpx.Response:
            with self._file.open("rb") as file:
                return to.post(f"/onerec/models/{self._name}/weights", content=file, headers=headers)

        self._insist(send, address, "a push of weights")
        self._sent[address] = self._sent.get(address, 0) + 1

    def _parameters(self, count: int, seed: int, mode: Mode) -> dict[str, Any]:
        chosen: dict[str, Any] = {"mode": mode, "exclude_seen": self.config.exclude_seen}
        if mode == "beam":
            return {**chosen, "beam_width": count, "num_items": count}
        drawn = {"num_samples": count, "seed": seed, "temperature": self.config.temperature}
        return {**chosen, **drawn, "constrained": self.config.constrained}

    def _ask(self, context: Context, parameters: dict[str, Any], address: str) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, log_probs) float64 [b, n, L] of the weights pushed last, NaN where a request got fewer."""
        timeout = {"timeout_ms": int(1000 * TIMEOUT_S)}
        body = {"inputs": inputs_of(context, self._names.catalogue), "parameters": {**parameters, **timeout}}
        path, deadline = f"/v2/models/{self._name}/infer", time.monotonic() + self._patience_s
        while True:
            before = dict(self._sent)
            answer, address = self._insist(lambda to: to.post(path, json=body), address, "roll-outs")
            found = answer.json()
            version = found["parameters"]["model_version"]
            if version == self.version:
                return _arrays(found)
            log.warning("the roll-out server at %s has weights %s, not ours (%s)", address, version, self.version)
            if time.monotonic() > deadline:
                raise RolloutsUnavailable(
                    f"the roll-out server at {address} keeps answering with weights {version!r}, not "
                    f"{self.version!r}; give every trainer a server of its own"
                )
            with self._sending:  # of several threads that find a restarted server one pushes, the others ask again
                if self._sent.get(address) == before.get(address):
                    self._send(address)

    def _insist(
        self, send: Callable[[httpx.Client], httpx.Response], address: str, what: str
    ) -> tuple[httpx.Response, str]:
        """The answer to ``send`` and who gave it: ``address``, or another server when that one is away.

        Tried again with growing pauses while nobody answers.
        """
        deadline, pause = time.monotonic() + self._patience_s, PAUSES_S[0]
        while True:
            try:
                answer = send(self._client(address))
            except httpx.TransportError as error:
                said = f"{type(error).__name__}: {error}"
            else:
                if answer.status_code < 400:
                    return answer, address
                said = _said(answer)
                if answer.status_code not in AWAY:
                    raise self._refused(address, what, said)
            if time.monotonic() + pause > deadline:
                raise RolloutsUnavailable(
                    f"the roll-out server at {address} did not give {what} for {self._patience_s:g} s ({said}); the "
                    "last good checkpoint is kept: see that the server runs, then start this again and it resumes"
                )
            log.warning("waiting for %s from %s (%s)", what, address, said)
            time.sleep(pause)
            pause, address = min(2 * pause, PAUSES_S[1]), self._next(address)

    def _next(self, address: str) -> str:
        """The server after ``address`` among those there are now."""
        known = self._addresses()
        return next((each for each in known if each > address), known[0])

    def _refused(self, address: str, what: str, said: str) -> RolloutsRefused:
        return RolloutsRefused(
            f"the roll-out server at {address} refused {what} ({said}); start it with `python -m models.serving --role "
            "rollout --model onerec=VERSION` on the bundle trained from, and give both sides the same "
            "ONEREC_ADMIN_TOKEN"
        )

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
    given = {each["name"]: each for each in answer["outputs"]}
    counts = np.array([int(count) for count in answer["parameters"]["counts"].split(",")])

    def output(name: str) -> np.ndarray:
        found = np.array(given[name]["data"], np.float64).reshape(given[name]["shape"])
        absent = np.arange(found.shape[1]) >= counts[:, None]
        return np.where(absent[..., None], np.nan, found)

    return output("sids"), output("log_probs")


def _said(answer: httpx.Response) -> str:
    """What the server says went wrong."""
    try:
        return f"{answer.status_code}: {answer.json()['error']}"
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code}: {answer.text[:200]}"
