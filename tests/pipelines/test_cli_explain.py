"""`onerec explain` on real object storage and a real Valkey, without a model server."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner
from watched import watched

from features import deltas
from features.histories.windows import Limits
from features.offline import apply
from features.online import OnlineFeatures
from features.settings import settings
from features.storage import connect
from features.world.simulator import Simulator, SimulatorConfig
from models.bundle import publish, save, set_alias
from models.onerec_v2 import OneRecV2, V2Config
from models.tokenizer.tokenizer import Tokenizer, TokenizerConfig
from pipelines import stack
from pipelines.__main__ import app

END = datetime(2026, 1, 10, tzinfo=UTC)
END_MS = int(END.timestamp() * 1000)


@pytest.fixture
def onerec(environment, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the command against the test's storage and Valkey; no model server answers."""
    monkeypatch.setattr(stack, "activate", lambda home, services=None: None)
    monkeypatch.setenv("ONEREC_SERVER_URL", "http://127.0.0.1:9")
    settings.cache_clear()

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["explain", *arguments, "--home", str(environment.home)])

    return run


@pytest.fixture
def items(environment, tmp_path: Path) -> list[str]:
    """The items of a version in production with random weights."""
    log = Simulator(SimulatorConfig(users=20, items=100, history_days=2)).history()
    tokenizer = Tokenizer.fit(log.items, log.exposures, TokenizerConfig(levels=3, codes=8, dim=8))
    model = OneRecV2(V2Config(codes=8, levels=3, d_model=16, layers=1, heads=2, kv_groups=1, embed=8))
    catalogue = tokenizer.catalogue(log.items, log.exposures)
    parts = {"model": model, "tokenizer": tokenizer, "catalogue": catalogue, "limits": Limits(), "metrics": {}}
    version = publish(connect(), save(tmp_path / "made", **parts), data_time=END)
    set_alias(connect(), "production", version)
    return catalogue.item_ids


def push(environment: Any, user: str, seen: list[str]) -> None:
    window = watched(seen, labels=2, now_ms=END_MS)
    apply(environment.home / "feast", environment)
    OnlineFeatures.connect(environment.home / "feast", environment).push_windows(
        [user], [window], [window], np.array([END_MS - 500])
    )


def test_a_page_and_json_tell_the_same(onerec, environment, items: list[str]) -> None:
    push(environment, "a/b", items[:5])
    deltas.block(connect(), [items[7]], "stolen")
    answer = onerec("--user", "a/b", "--num-items", "5", "--beam-width", "512", "--exclude", items[8], "--json")
    assert answer.exit_code == 0, answer.stderr
    found = json.loads(answer.stdout)
    why = {item["item_id"]: item["status"] for item in found["items"]}
    assert [why[item] for item in items[:5]] == ["seen"] * 5
    assert (why[items[7]], why[items[8]]) == ("taken down", "excluded")
    assert list(why.values()).count("shown") == 5
    assert [len(pathway["events"]) for pathway in found["pathways"]] == [5, 5, 0]
    page = Path(found["page"])
    assert page.parent == environment.home / "explain"
    written = page.read_text()
    assert "a/b" in written
    assert "taken down" in written
    told = onerec("--user", "a/b", "--beam-width", "512")
    assert told.exit_code == 0, told.stderr
    assert "10 items shown, 6 of the beam filtered" in " ".join(told.stdout.split())
    assert "nothing to compare with: http://127.0.0.1:9/v2/models/onerec/infer does not answer" in " ".join(
        told.stdout.split()
    )


def test_without_features_it_is_the_newcomers_answer_with_a_warning(onerec, items: list[str], tmp_path: Path) -> None:
    answer = onerec("--user", "new", "--output", str(tmp_path / "deep" / "page.html"))
    assert answer.exit_code == 0, answer.stderr
    assert "the answer for newcomers" in " ".join(answer.stderr.split())
    assert "The feature store does not answer" in (tmp_path / "deep" / "page.html").read_text()


@contextmanager
def answering(status: int, body: str) -> Iterator[str]:
    """The address of a server that answers every request so."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_what_the_server_answered_is_told_with_what_to_do(
    onerec, items: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [
        (404, '{"error": "there is no model onerec"}', "answered 404: there is no model onerec; the service is well"),
        (503, '{"error": "model onerec is not ready"}', "answered 503: model onerec is not ready; `onerec status`"),
        (200, "<html>hello</html>", "answered 200 with no JSON: '<html>hello</html>'; another program listens there"),
    ]
    for status, body, words in cases:
        with answering(status, body) as url:
            monkeypatch.setenv("ONEREC_SERVER_URL", url)
            settings.cache_clear()
            answer = onerec("--user", "new", "--json")
        assert answer.exit_code == 0, answer.stderr
        told = json.loads(answer.stdout)
        assert words in told["server"]
        assert "does not answer" not in told["server"]
        assert f"answered {status}" in Path(told["page"]).read_text()


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["--user", "u"], "nothing is in production", 1),
        (["--user", "u", "--version", "20200101T000000-00000000"], "no complete bundle", 1),
        (["--user", "u", "--version", ".."], "no complete bundle", 1),
        (["--user", "u", "--beam-width", "513"], "less than or equal to 512", 2),
        (["--user", "u", "--output", "/"], "--output / is a folder hint: give a file, such as --output /page.html", 2),
        (["--user", "u", "--output", f"{__file__}/page.html"], "is a file, not a folder", 2),
        ([], "Missing option", 2),
    ],
)
def test_what_cannot_be_explained_is_said(onerec, environment, arguments: list[str], words: str, code: int) -> None:
    answer = onerec(*arguments)
    assert answer.exit_code == code
    assert words in " ".join(answer.stderr.split())
