"""Infra validation (after TFX's InfraValidator): the real server, started on the candidate, must answer as it should.

The candidate lies in a cache of its own under the name it will be published by, and ``python -m models.serving`` is
started on it as a process: role rollout, which serves one version, follows no alias and writes no served events, with
the same model code, protocol and feature look-up as every other role. It is asked over HTTP for people it knows and one
it does not, alone and in a batch. Left out: load (``benchmarks.serving``), gRPC, the split into two processes.
"""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import urllib3

from models.bundle import MANIFEST

HOST = "127.0.0.1"
MODEL = "onerec"
STRANGER = "nobody-has-this-id"
ALIKE = 0.9
"""Items that a batch and single requests must have in common: sums in another order may swap near ties."""
PATIENT = ("--feature_budget_ms", "5000", "--timeout_ms", "60000", "--queue_ms", "20000")
"""What is asked here is whether the answers are right, beside trainings on the same cores."""
_TAIL = 1500  # characters of the server's log that a refusal quotes


@dataclass(frozen=True, kw_only=True)
class InfraConfig:
    """How long the server may take and what it is asked; the bounds are ours."""

    patience_s: float = 180.0
    """Until it is ready: reading and warming up a large bundle on a busy machine takes a while."""
    requests: int = 20
    num_items: int = 10
    p95_ms: float = 2000.0
    attempts: int = 2
    """Starts: a port may be taken between its choice and its use."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What is validated: a bundle folder without a manifest, the manifest it will have, and whom to ask for."""

    folder: Path
    manifest: dict[str, Any]
    users: Sequence[str]
    now_ms: int

    @property
    def version(self) -> str:
        """The name it will be published by."""
        return str(self.manifest["version"])


class ServerFailed(RuntimeError):
    """The server did not start on the candidate, or an answer is not one; the message says what happened."""


def validate(candidate: Candidate, config: InfraConfig | None = None) -> dict[str, Any]:
    """Starts the server and asks it; returns ``passed`` and ``failed``, a sentence for each check, and its timings."""
    config = config or InfraConfig()
    passed, failed, timings = list[str](), list[str](), dict[str, float]()
    try:
        with _started(candidate, config) as (url, seconds):
            timings["start_s"] = seconds
            passed.append(f"ready after {seconds:.1f} s")
            for good, sentence in _asked(url, candidate, config, timings):
                (passed if good else failed).append(sentence)
    except ServerFailed as error:
        failed.append(str(error))
    return {"passed": passed, "failed": failed, **timings}


def _asked(
    url: str, candidate: Candidate, config: InfraConfig, timings: dict[str, float]
) -> Iterator[tuple[bool, str]]:
    """(passed, sentence) of every check."""
    people = [*candidate.users[: config.requests - 1], STRANGER]
    taken, alone = [], []
    for number in range(config.requests):
        began = time.perf_counter()
        alone += infer(url, [people[number % len(people)]], candidate, config)
        taken.append(1000 * (time.perf_counter() - began))
    yield True, f"answered {config.requests} requests for {len(people)} users, one of them unknown"
    versions = {answer["model_version"] for answer in alone}
    yield versions == {candidate.version}, f"answers name {', '.join(sorted(versions))}, expected {candidate.version}"
    yield _lists(alone, candidate, config)
    together = infer(url, people, candidate, config)
    shared = float(np.mean([_shared(*pair) for pair in zip(together, alone, strict=False)]))
    yield shared >= ALIKE, f"a batch of {len(people)} users got {shared:.0%} of the items they got one by one"
    timings["p50_ms"], timings["p95_ms"] = (float(np.percentile(taken, q)) for q in (50, 95))
    quick = timings["p95_ms"] <= config.p95_ms
    yield quick, f"95 % of answers within {timings['p95_ms']:.0f} ms, must be within {config.p95_ms:g} ms"


def _shared(answer: dict[str, Any], other: dict[str, Any]) -> float:
    """Share of the items of ``answer`` that ``other`` has too."""
    return len(set(answer["item_ids"]) & set(other["item_ids"])) / max(len(answer["item_ids"]), 1)


def _lists(answers: list[dict[str, Any]], candidate: Candidate, config: InfraConfig) -> tuple[bool, str]:
    """Every answer: as many items as asked for, each once and under its own SID, finite log-probabilities."""
    table = pq.read_table(candidate.folder / "sids.parquet")
    sid_of = dict(zip(table["item_id"].to_pylist(), map(tuple, table["sid"].to_pylist()), strict=True))
    wanted = min(config.num_items, len(sid_of))
    for answer in answers:
        items = answer["item_ids"]
        wrong = [item for item, sid in zip(items, answer["sids"], strict=True) if sid_of.get(item) != tuple(sid)]
        if wrong:
            return False, f"{len(wrong)} items do not have the SID they came with, first {wrong[0]!r}"
        if len(set(items)) != len(items) or len(items) < wanted:
            return False, f"a list of {len(items)} items, {len(set(items))} of them different; expected {wanted}"
        numbers = [value for row in answer["log_probs"] for value in row]
        if not all(math.isfinite(value) and value <= 1e-4 for value in numbers):
            return False, "a log-probability is above 0 or not finite"
    return True, f"{len(answers)} lists of {wanted} different items of the catalogue, log-probabilities finite"


def infer(url: str, users: Sequence[str], candidate: Candidate, config: InfraConfig) -> list[dict[str, Any]]:
    """One answer a user over the Open Inference Protocol; raises ServerFailed for anything but an answer."""
    shape = [len(users)]
    body = {
        "parameters": {"num_items": config.num_items},
        "inputs": [
            {"name": "user_id", "datatype": "BYTES", "shape": shape, "data": list(users)},
            {"name": "time_ms", "datatype": "INT64", "shape": shape, "data": [candidate.now_ms] * len(users)},
        ],
    }
    status, text = _http("POST", f"{url}/v2/models/{MODEL}/infer", json.dumps(body).encode())
    if status != 200:
        raise ServerFailed(f"a request for {len(users)} users was answered {status}: {text[:300]}")
    try:
        answer = json.loads(text)
        outputs = {each["name"]: np.array(each["data"], object).reshape(each["shape"]) for each in answer["outputs"]}
        version = str(answer["parameters"]["model_version"])
        kept = [[place for place, item in enumerate(row) if item] for row in outputs["item_ids"]]
        return [
            {name: outputs[name][row][places].tolist() for name in ("item_ids", "sids", "log_probs")}
            | {"model_version": version}
            for row, places in enumerate(kept)
        ]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ServerFailed(f"an answer cannot be read ({type(error).__name__}: {error}): {text[:300]}") from error


@contextmanager
def _started(candidate: Candidate, config: InfraConfig) -> Iterator[tuple[str, float]]:
    """The server's URL and the seconds until it was ready; ends it afterwards."""
    with tempfile.TemporaryDirectory(prefix="onerec-infra-") as scratch:
        home = Path(scratch)
        cached = home / "bundles" / candidate.version
        shutil.copytree(candidate.folder, cached)
        (cached / MANIFEST).write_text(json.dumps(candidate.manifest))
        for attempt in range(1, config.attempts + 1):
            log, began = home / f"server{attempt}.log", time.monotonic()
            process, url = _start(candidate.version, home, log)
            try:
                if _ready(process, url, began + config.patience_s):
                    yield url, time.monotonic() - began
                    return
            finally:
                _end(process)
        said = log.read_text(errors="replace")[-_TAIL:]
        raise ServerFailed(
            f"the server was not ready within {config.patience_s:g} s at {config.attempts} starts; it said: {said}"
        )


def _start(version: str, home: Path, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    port, grpc = _free_ports(2)
    command = [sys.executable, "-m", "models.serving", "--role", "rollout", "--model", f"{MODEL}={version}"]
    command += ["--host", HOST, "--port", str(port), "--grpc_port", str(grpc), *PATIENT]
    spared = ",".join(filter(None, [os.environ.get("no_proxy", ""), HOST]))
    environment = {**os.environ, "ONEREC_HOME": str(home), "no_proxy": spared, "NO_PROXY": spared}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    return process, f"http://{HOST}:{port}"


def _ready(process: subprocess.Popen[bytes], url: str, deadline: float) -> bool:
    while time.monotonic() < deadline and process.poll() is None:
        if _http("GET", f"{url}/v2/models/{MODEL}/ready")[0] == 200:
            return True
        time.sleep(0.2)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _http(method: str, url: str, body: bytes | None = None) -> tuple[int, str]:
    """(status, text), status 0 when nobody answers."""
    timeout = urllib3.Timeout(connect=2, read=60)
    headers = {"content-type": "application/json"}
    try:
        response = urllib3.request(method, url, body=body, headers=headers, timeout=timeout, retries=False)
    except urllib3.exceptions.HTTPError as error:
        return 0, str(error)
    return response.status, response.data.decode(errors="replace")


def _free_ports(count: int) -> list[int]:
    """Distinct loopback ports that nobody listens on now."""
    sockets = [socket.create_server((HOST, 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
