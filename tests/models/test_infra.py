"""Infra validation against the real server as a process; what it says of answers that are wrong is asked of a fake."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest

from models import infra
from models.bundle import seal
from models.infra import Candidate, InfraConfig, validate

NOW = datetime(2026, 1, 2, tzinfo=UTC)
FEW = InfraConfig(requests=4, p95_ms=60_000)


def candidate_of(folder: Path) -> Candidate:
    manifest = seal(folder, data_time=NOW)
    return Candidate(folder=folder, manifest=manifest, users=["u1", "u2"], now_ms=int(NOW.timestamp() * 1000))


def servers() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "models.serving" in " ".join(p.cmdline())]


@pytest.mark.long
def test_the_real_server_answers_on_a_whole_bundle(
    environment, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    candidate = candidate_of(write_bundle(tmp_path / "made"))
    report = validate(candidate, FEW)
    assert report["failed"] == [], report
    said = " ".join(report["passed"])
    assert "answered 4 requests for 3 users, one of them unknown" in said
    assert f"answers name {candidate.version}" in said
    assert "4 lists of 10 different items of the catalogue" in said
    assert 0 < report["p50_ms"] <= report["p95_ms"]
    assert servers() == [], "the server is gone"
    assert sorted(path.name for path in candidate.folder.iterdir()) == sorted(candidate.manifest["files"])


@pytest.mark.long
def test_a_bundle_that_is_not_what_its_manifest_says_is_refused_with_the_servers_words(
    environment, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    candidate = candidate_of(write_bundle(tmp_path / "made"))
    weights = candidate.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00\x01")
    report = validate(candidate, InfraConfig(attempts=1))
    assert report["passed"] == []
    assert "model.safetensors is corrupt" in report["failed"][0] or "no complete bundle" in report["failed"][0]
    assert servers() == []


class Wrong(BaseHTTPRequestHandler):
    """Answers every request with what the test put into ``answer``."""

    answer: tuple[int, Any] = (200, {})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(self.answer[0])
        self.end_headers()
        self.wfile.write(json.dumps(self.answer[1]).encode())

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture
def fake() -> Any:
    server = HTTPServer(("127.0.0.1", 0), Wrong)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def answer_of(candidate: Candidate, **changes: Any) -> dict[str, Any]:
    """One user's answer: the first two items of the catalogue under their SIDs, unless ``changes`` say otherwise."""
    table = infra.pq.read_table(candidate.folder / "sids.parquet").slice(0, 2).to_pydict()
    items = changes.get("items", table["item_id"])
    sids = changes.get("sids", table["sid"])
    log_probs = changes.get("log_probs", [[-1.0] * 3] * len(items))
    n = len(items)
    outputs = [
        {"name": "item_ids", "shape": [1, n], "data": items},
        {"name": "sids", "shape": [1, n, 3], "data": [code for sid in sids for code in sid]},
        {"name": "log_probs", "shape": [1, n, 3], "data": [value for row in log_probs for value in row]},
    ]
    return {"outputs": outputs, "parameters": {"model_version": candidate.version}}


def lists(candidate: Candidate, url: str, **changes: Any) -> tuple[bool, str]:
    Wrong.answer = (200, answer_of(candidate, **changes))
    config = InfraConfig(num_items=2)
    return infra._lists(infra.infer(url, ["u1"], candidate, config), candidate, config)


def test_wrong_answers_are_told_apart(fake: str, write_bundle: Callable[..., Path], tmp_path: Path) -> None:
    candidate = candidate_of(write_bundle(tmp_path / "made"))
    assert lists(candidate, fake)[0]
    cases: dict[str, dict[str, Any]] = {
        "do not have the SID they came with, first 'nothing'": {"items": ["i0", "nothing"]},
        "1 items do not have the SID": {"sids": [[0, 0, 0], [7, 7, 7]]},
        "a list of 2 items, 1 of them different": {"items": ["i0", "i0"], "sids": None},
        "a list of 1 items": {"items": ["i0"], "sids": None},
        "a log-probability is above 0 or not finite": {"log_probs": [[-1.0] * 3, [0.5] * 3]},
    }
    sid = infra.pq.read_table(candidate.folder / "sids.parquet")["sid"].to_pylist()
    cases["1 items do not have the SID"]["sids"] = [sid[0], [(code + 1) % 8 for code in sid[1]]]
    for words, changes in cases.items():
        if changes.get("sids", ()) is None:
            changes["sids"] = [sid[0]] * len(changes["items"])
        good, sentence = lists(candidate, fake, **changes)
        assert not good
        assert words in sentence
    for status, body, words in ((500, {"error": "oh"}, "was answered 500"), (200, {"outputs": []}, "cannot be read")):
        Wrong.answer = (status, body)
        with pytest.raises(infra.ServerFailed, match=words):
            infra.infer(fake, ["u1"], candidate, FEW)
    with pytest.raises(infra.ServerFailed, match="was answered 0"):
        infra.infer("http://127.0.0.1:9", ["u1"], candidate, FEW)
