"""`onerec items` on real object storage, without a server."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from features import catalog, deltas
from features.histories.windows import Limits
from features.settings import settings
from features.storage import connect
from features.world.simulator import Simulator, SimulatorConfig
from models.bundle import publish, save, set_alias
from models.onerec_v2 import OneRecV2, V2Config
from models.tokenizer.tokenizer import Tokenizer, TokenizerConfig
from pipelines import stack
from pipelines.__main__ import app


@pytest.fixture
def onerec(environment, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Runs the command against the test's storage."""
    monkeypatch.setattr(stack, "activate", lambda home, services=None: None)
    monkeypatch.setenv("ONEREC_SERVER_URL", "http://127.0.0.1:9")
    settings.cache_clear()

    def run(*arguments: str) -> object:
        return CliRunner().invoke(app, ["items", *arguments, "--home", str(environment.home)])

    return run


@pytest.fixture
def version(environment, tmp_path: Path) -> str:
    """A published bundle of a hundred items, with random weights."""
    log = Simulator(SimulatorConfig(users=20, items=100, history_days=2)).history()
    tokenizer = Tokenizer.fit(log.items, log.exposures, TokenizerConfig(levels=3, codes=8, dim=8))
    model = OneRecV2(V2Config(codes=8, levels=3, d_model=16, layers=1, heads=2, kv_groups=1, embed=8))
    catalogue = tokenizer.catalogue(log.items, log.exposures)
    parts = {"model": model, "tokenizer": tokenizer, "catalogue": catalogue, "limits": Limits(), "metrics": {}}
    made = publish(connect(), save(tmp_path / "made", **parts), data_time=datetime(2026, 1, 2, tzinfo=UTC))
    set_alias(connect(), "production", made)
    return made


def test_adding_blocking_listing(onerec, version: str, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("item_id,title,duration_ms\nn1,One,9000\nn2,Two,9000\n")
    added = onerec("add", str(tmp_path / "new.csv"), "--no-wait", "--json")
    assert added.exit_code == 0, added.stderr
    assert json.loads(added.stdout)["new"] == {version: 2}
    assert catalog.read_items(connect())["item_id"].to_pylist() == ["n1", "n2"]
    again = onerec("add", str(tmp_path / "new.csv"))
    assert f"{version} had them all" in again.stdout.replace("\n", " ")
    blocked = onerec("block", "n1", "ghost", "--reason", "stolen", "--no-wait")
    assert blocked.exit_code == 0
    assert "1 of them are not in the catalogue (ghost)" in blocked.stderr.replace("\n", " ")
    listed = json.loads(onerec("list", "--json").stdout)
    assert [(row["item_id"], row["reason"]) for row in listed["blocked"]] == [("ghost", "stolen"), ("n1", "stolen")]
    assert listed["added"] == {version: ["n1", "n2"]}
    assert onerec("unblock", "n1", "ghost", "--no-wait").exit_code == 0
    assert "nothing is taken down" in onerec("list").stdout


def test_without_a_version_the_items_wait_for_the_first(onerec, tmp_path: Path) -> None:
    (tmp_path / "new.jsonl").write_text('{"item_id": "n1", "duration_ms": 5}\n')
    connect().ensure_bucket()
    result = onerec("add", str(tmp_path / "new.jsonl"))
    assert result.exit_code == 0
    assert "in the first one that is trained" in result.stdout.replace("\n", " ")


def test_a_bad_cell_is_named_by_row_column_and_value(onerec, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("item_id,duration_ms\nn1,9000\nn2,long\n")
    result = onerec("add", str(tmp_path / "new.csv"))
    assert result.exit_code == 2
    assert "row 2, column 'duration_ms' is 'long'; expected a whole number of milliseconds" in result.stderr
    assert "hint: nothing was added; mend the file" in result.stderr
    assert list(connect().keys("catalog/")) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["add", f"{Path(__file__).parent}/golden"], "items are read from"),
        (["add", "nowhere.csv"], "there is no file"),
        (["add", "new.xlsx"], "items are read from"),
        (["block", ""], "an item id is empty"),
        (["block", "v00001", " "], "an item id is empty"),
        (["block"], "Missing argument"),
    ],
)
def test_bad_usage_exits_2_and_changes_nothing(onerec, arguments: list[str], words: str) -> None:
    result = onerec(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert deltas.block_keys(connect()) == []
    assert list(connect().keys("catalog/")) == []
