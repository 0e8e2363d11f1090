"""`onerec bundles diff` on real object storage: what changed is named by section, what did not is not."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from features.histories.windows import Limits
from features.storage import Storage, connect
from features.world.simulator import Simulator, SimulatorConfig
from models.bundle import publish, save, set_alias
from models.onerec_v2 import OneRecV2, V2Config
from models.tokenizer.tokenizer import Tokenizer, TokenizerConfig
from pipelines import stack
from pipelines.__main__ import app

END = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture
def onerec(environment, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(stack, "activate", lambda home, services=None: None)

    def run(*arguments: str) -> Any:
        result = CliRunner().invoke(app, ["bundles", *arguments, "--home", str(environment.home)])
        assert result.exit_code in (0, 2), result.stderr
        return result

    return run


@pytest.fixture
def versions(environment, tmp_path: Path) -> tuple[str, str]:
    """A version and its child: other weights, more metrics, a longer training, a block after it; one tokenizer."""
    log = Simulator(SimulatorConfig(users=20, items=100, history_days=2)).history()
    tokenizer = Tokenizer.fit(log.items, log.exposures, TokenizerConfig(levels=3, codes=8, dim=8))
    made: list[str] = []
    for number, recall in enumerate((0.10, 0.12)):
        model = OneRecV2(V2Config(codes=8, levels=3, d_model=16, layers=1, heads=2, kv_groups=1, embed=8))
        catalogue = tokenizer.catalogue(log.items.slice(0, 90 + 10 * number), log.exposures)
        metrics = {"candidate": {"recall@50": recall, "legality": 0.9}}
        parts = {"model": model, "tokenizer": tokenizer, "catalogue": catalogue, "limits": Limits(), "metrics": metrics}
        end, run_id = END + timedelta(days=number), f"night-{number}"
        config = {"config": {"epochs": 1 + number, "seed": 0}, "preset": "tiny"}
        record = {"digest": "d", "inputs": config, "summary": {}}
        connect().put_json(f"runs/{run_id}/pretrain/done.json", record)
        lineage = {"run_id": run_id, "data": f"data{number}", "window": {"start": "2025-12-20", "end": end.isoformat()}}
        folder = save(tmp_path / str(number), **parts)
        made.append(publish(connect(), folder, data_time=end, parents=made[-1:], lineage=lineage))
    set_alias(connect(), "production", made[1])
    return made[0], made[1]


def changes(result: Any) -> dict[tuple[str, str], tuple[Any, Any]]:
    return {
        (each["section"], each["name"]): (each["old"], each["new"]) for each in json.loads(result.stdout)["changes"]
    }


def test_what_changed_is_named_and_what_did_not_is_not(onerec, versions: tuple[str, str]) -> None:
    old, new = versions
    found = changes(onerec("diff", old, "--json"))
    assert found["lineage", "parents"] == ("", old)
    assert found["lineage", "run"] == ("night-0", "night-1")
    assert found["data", "digest"] == ("data0", "data1")
    assert found["data", "end"] == (END.isoformat(), (END + timedelta(days=1)).isoformat())
    assert found["recipe", "pretrain.epochs"] == (1, 2)
    assert found["catalogue", "items"] == (90, 100)
    assert found["metrics", "recall@50"] == (0.10, 0.12)
    assert ("files", "model.safetensors") in found
    assert ("files", "tokenizer.safetensors") not in found
    same = [("recipe", "pretrain.seed"), ("data", "start"), ("metrics", "legality"), ("recipe", "pretrain.preset")]
    assert not set(same) & set(found)
    shown = onerec("diff", old, new).stdout
    assert "+20.0%" in shown
    assert "pretrain.epochs" in shown


def test_nothing_is_cut_on_a_narrow_screen(onerec, versions: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = onerec("list").stdout
    assert all(version in shown for version in versions)
    assert "…" not in shown + onerec("diff", *versions).stdout


def test_a_version_is_like_itself(onerec, versions: tuple[str, str]) -> None:
    assert "alike in everything" in onerec("diff", versions[1], "production").stdout.replace("\n", " ")


def test_the_recipe_of_a_run_that_is_gone_is_told_as_unknown(onerec, versions: tuple[str, str]) -> None:
    storage: Storage = connect()
    storage.remove("runs/night-0/pretrain/done.json")
    found = changes(onerec("diff", *versions, "--json"))
    assert found["recipe", "pretrain.epochs"] == (None, 2)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nobody", "no alias 'nobody'"),
        ("../x", "no alias '../x'"),
        ("20200101T000000-aaaa", "no complete bundle"),
    ],
)
def test_an_unknown_version_ends_with_those_there_are(onerec, versions: tuple[str, str], name: str, said: str) -> None:
    result = onerec("diff", name)
    assert result.exit_code == 2
    assert said in result.stderr.replace("\n", " ")


def test_what_was_decided_about_a_version(onerec: Callable[..., Any], versions: tuple[str, str]) -> None:
    beside = f"models/onerec/{versions[1]}/records"
    assert "nothing is told of it" in onerec("show").stdout
    decision = {"blessed": True, "decided_at": "today", "failed": [], "passed": ["recall@50 = 0.12, must be >= 0.01"]}
    canary = {"status": "promoted", "stable": versions[0], "reason": "stay_seconds 12 against 10"}
    lineage = {"parents": [versions[0]], "segments": ["a", "b"], "code": {"release": "0.1.0", "sources": "f" * 64}}
    outcome = {"run_id": "night-1", "pipeline": "retraining", "state": "SUCCEEDED", "lineage": lineage}
    outcome |= {"cost": {"seconds": 61.2, "cpu_seconds": 99.0, "stages": {}}}
    for name, record in (("decision", decision), ("canary", canary), ("outcome", outcome)):
        connect().put_json(f"{beside}/{name}.json", record)
    shown = onerec("show", "production").stdout
    for words in ("gate blessed today", "✓ recall@50 = 0.12", f"promoted against {versions[0]}", "61 s, 99 s of"):
        assert words in shown
    assert f"2 segments, on from {versions[0]}, code 0.1.0 ffffffffffff" in shown
    assert json.loads(onerec("show", versions[1], "--json").stdout)["decision"] == decision
    assert onerec("show", "nothing").exit_code == 2
