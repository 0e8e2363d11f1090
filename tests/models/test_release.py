"""The pusher: it gives users what was blessed, byte for byte and against what is there, and nothing else."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from features.runs import Run
from features.storage import Storage, connect
from models.bundle import list_versions, read_alias, read_manifest, seal, set_alias
from models.release import NotBlessed, ProductionMoved, publish_run
from monitoring import trial
from monitoring.outcome import record_run
from monitoring.quality import Decision, keep

END = datetime(2026, 1, 2, tzinfo=UTC)
Evaluate = Callable[..., str]


@pytest.fixture
def evaluate(environment, write_bundle: Callable[..., Path], tmp_path: Path) -> Evaluate:
    """``evaluate(run_id, seed, against="", blessed=True)`` stores what the stages before the pusher would."""

    def stored(run_id: str, seed: int, against: str = "", blessed: bool = True) -> str:
        made, run = write_bundle(tmp_path / f"made{seed}", seed=seed), Run(connect(), run_id)

        def copy(folder: Path) -> dict:
            (folder / "bundle").mkdir()
            for file in made.iterdir():
                (folder / "bundle" / file.name).write_bytes(file.read_bytes())
            return {}

        def data(folder: Path) -> dict:
            (folder / "manifest.json").write_text(json.dumps({"segments": ["exposures/a.parquet"]}))
            return {}

        run.stage("data", {"end": END.isoformat()}, data)
        run.stage("evaluate", {"aligned": str(seed), "base": against}, copy)
        sealed = seal(made, data_time=END)
        failed = () if blessed else ("recall@50 = 0, must be >= 0.01",)
        about = {"version": sealed["version"], "digest": sealed["digest"], "against": against}
        keep(run.storage, f"runs/{run_id}", Decision(blessed=blessed, passed=(), failed=failed, **about))
        return str(sealed["version"])

    return stored


def publish(run_id: str, base: str = "", canary: str = "") -> str:
    return publish_run(run_id, alias="production", base=base, canary=canary)


def nobody_meets_it(storage: Storage, production: str | None) -> bool:
    return (read_alias(storage, "production"), trial.read(storage)) == (production, None)


def test_what_was_not_blessed_is_refused_with_the_reason(evaluate: Evaluate) -> None:
    evaluate("r", 0, blessed=False)
    with pytest.raises(NotBlessed, match=r"recall@50 = 0, must be >= 0\.01"):
        publish("r")
    assert nobody_meets_it(connect(), None)
    assert list_versions(connect()) == []


@pytest.mark.parametrize("edited", ["model.safetensors", "sids.parquet"])
def test_a_bundle_edited_after_its_blessing_is_refused(evaluate: Evaluate, edited: str) -> None:
    evaluate("r", 0)
    key = f"runs/r/evaluate/bundle/{edited}"
    connect().put(key, connect().get(key) + b"\x00")
    with pytest.raises(NotBlessed, match="was changed since"):
        publish("r")
    assert nobody_meets_it(connect(), None)
    assert list_versions(connect()) == []


def test_the_records_lie_beside_the_bundle(evaluate: Evaluate) -> None:
    version = evaluate("r", 0)
    assert publish("r") == version
    storage = connect()
    assert read_alias(storage, "production") == version
    decision = storage.get_json(f"models/onerec/{version}/records/decision.json")
    assert decision["digest"] == read_manifest(storage, version)["digest"]
    assert version in storage.get(f"models/onerec/{version}/records/decision.html").decode()
    outcome = record_run("r", pipeline="training", state="SUCCEEDED", error="")
    assert storage.get_json(f"models/onerec/{version}/records/outcome.json") == outcome
    assert outcome["lineage"]["segments"] == ["exposures/a.parquet"]
    assert set(outcome["lineage"]["digests"]) == {"data", "evaluate", "publish"}
    assert len(outcome["lineage"]["code"]["sources"]) == 64
    assert outcome["cost"]["seconds"] == pytest.approx(
        sum(each["seconds"] for each in outcome["cost"]["stages"].values()), abs=0.01
    )
    assert list_versions(storage) == [version], "records are no bundles"


def test_two_runs_at_once(evaluate: Evaluate) -> None:
    """Both went on from the same model: the second was never compared with what the first put there."""
    first = evaluate("r0", 0)
    publish("r0")
    second, third = evaluate("r1", 1, against=first), evaluate("r2", 2, against=first)
    publish("r1", base=first)
    assert record_run("r1", pipeline="retraining", state="SUCCEEDED", error="")["lineage"]["parents"] == [first]
    with pytest.raises(ProductionMoved, match=f"production is {second} now, the candidate {third} was compared"):
        publish("r2", base=first)
    assert nobody_meets_it(connect(), second)
    assert third not in list_versions(connect())


def test_a_finished_run_that_is_repeated_undoes_nothing(evaluate: Evaluate) -> None:
    """Somebody rolled back after it: starting the old run again must not bring its model back."""
    first = evaluate("r0", 0)
    publish("r0")
    second = evaluate("r1", 1, against=first)
    publish("r1", base=first)
    set_alias(connect(), "production", first)
    assert publish("r1", base=first) == second
    assert nobody_meets_it(connect(), first)


def test_a_candidate_is_tried_beside_production(evaluate: Evaluate) -> None:
    first = evaluate("r0", 0)
    publish("r0", canary="0.2")
    assert nobody_meets_it(connect(), first), "with nothing in production there is nothing to try it beside"
    second = evaluate("r1", 1, against=first)
    for _ in range(2):
        assert publish("r1", base=first, canary="0.2") == second
        storage = connect()
        assert (read_alias(storage, "production"), read_alias(storage, "candidate")) == (first, second)
        found = trial.read(storage)
        assert found is not None
        assert (found.version, found.stable, found.started) == (second, first, END.isoformat())
        assert (found.unit, found.config.share) == ("user", 0.2)
    evaluate("r2", 2, against=first)
    for canary in ("", "0.2"):
        with pytest.raises(trial.CanaryUnderWay, match=f"{second} is being tried since"):
            publish("r2", base=first, canary=canary)
    assert read_alias(connect(), "production") == first


def test_a_killed_publish_begins_its_canary_once(evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate("r0", 0)
    publish("r0")
    second = evaluate("r1", 1, against=first)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("models.release.trial.begin", killed)
        with pytest.raises(KeyboardInterrupt):
            publish("r1", base=first, canary="0.2")
    assert nobody_meets_it(connect(), first)
    publish("r1", base=first, canary="0.2")
    begun = trial.read(connect())
    assert begun is not None
    connect().remove("runs/r1/released.json")  # killed just before the marker
    publish("r1", base=first, canary="0.2")
    assert trial.read(connect()) == replace(begun)
    assert read_alias(connect(), "candidate") == second


def test_a_canary_that_cannot_be_read_publishes_nothing(evaluate: Evaluate) -> None:
    evaluate("r", 0)
    with pytest.raises(ValueError, match="neither a share nor a JSON object"):
        publish("r", canary="some")
    assert list_versions(connect()) == []
