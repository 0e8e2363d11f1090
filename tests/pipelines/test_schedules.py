"""Schedules become what the file says: in KFP's recurring runs, and on this machine."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded.kfp_api import KfpApi, serving
from recorded.kubernetes_api import Refused
from typer.testing import CliRunner

from features.settings import settings
from pipelines import scheduler
from pipelines.__main__ import app
from pipelines.compilation import PIPELINES, compile_one
from pipelines.local import PipelineFailed
from pipelines.profiles import Profile
from pipelines.schedules import PIPELINES as SCHEDULED
from pipelines.schedules import BadSchedule, Schedule, kept, parse

HOURLY = {"name": "retraining", "pipeline": "retraining", "cron": "0 0 * * * *", "parameters": {"policy": "on_drift"}}
WEEKLY = {"name": "tokenizer", "pipeline": "tokenizer_refresh", "cron": "0 30 3 * * 0"}


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpApi]:
    with serving() as api:
        monkeypatch.setenv("ONEREC_KFP_ENDPOINT", api.url)
        settings.cache_clear()
        yield api
    settings.cache_clear()


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path, Profile], Path]:
    """``compile_one`` that compiles everything once."""
    folder, known = tmp_path_factory.mktemp("packages"), {}

    def compile_once(name: str, path: Path, on: Profile) -> Path:
        key = (name, repr(on))
        if key not in known:
            known[key] = compile_one(name, folder / f"{len(known)}.yaml", on).read_bytes()
        path.write_bytes(known[key])
        return path

    return compile_once


@pytest.fixture(autouse=True)
def _compiles_once(packages: Callable[[str, Path, Profile], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.compilation.compile_one", packages)


def write(folder: Path, *schedules: dict[str, Any], **rest: Any) -> str:
    (folder / "schedules.yaml").write_text(json.dumps({"schedules": schedules, **rest}))
    return str(folder / "schedules.yaml")


def apply(folder: Path, *schedules: dict[str, Any], **rest: Any) -> dict[str, str]:
    result = CliRunner().invoke(app, ["schedule", "apply", write(folder, *schedules, **rest), "--json"])
    assert result.exit_code == 0, result.stderr
    return {each["name"]: each["action"] for each in json.loads(result.stdout)}


def enabled(kfp: KfpApi) -> dict[str, str]:
    return {
        run["display_name"].split("/")[1]: run["trigger"]["cron_schedule"]["cron"]
        for run in kfp.recurring.values()
        if run["status"] == "ENABLED"
    }


def test_recurring_runs_become_what_the_file_says(kfp: KfpApi, tmp_path: Path) -> None:
    assert apply(tmp_path, HOURLY, WEEKLY) == {"retraining": "created", "tokenizer": "created"}
    (hourly,) = [run for run in kfp.recurring.values() if "retraining" in run["display_name"]]
    assert (hourly["no_catchup"], hourly["max_concurrency"]) == (True, 1)
    assert hourly["runtime_config"]["parameters"] == {"policy": "on_drift"}
    assert apply(tmp_path, HOURLY, WEEKLY) == {"retraining": "unchanged", "tokenizer": "unchanged"}
    assert len(kfp.recurring) == 2
    slower = {**HOURLY, "cron": "0 0 */2 * * *"}
    assert apply(tmp_path, slower, WEEKLY) == {"retraining": "replaced", "tokenizer": "unchanged"}
    assert enabled(kfp) == {"retraining": "0 0 */2 * * *", "tokenizer": "0 30 3 * * 0"}
    assert apply(tmp_path, slower) == {"retraining": "unchanged", "tokenizer": "disabled"}
    assert enabled(kfp) == {"retraining": "0 0 */2 * * *"}
    assert apply(tmp_path, HOURLY)["retraining"] == "replaced", "an old one that was disabled does not count"


def test_other_steps_are_another_schedule(kfp: KfpApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recurring run keeps the images it was made with, so an upgrade must replace it."""
    apply(tmp_path, HOURLY)
    assert apply(tmp_path, HOURLY, profile="gpu") == {"retraining": "replaced"}
    assert apply(tmp_path, HOURLY, profile="gpu", objects={"config_map": "blue-pipelines"})["retraining"] == "replaced"
    (run,) = [run for run in kfp.recurring.values() if run["status"] == "ENABLED"]
    assert "blue-pipelines" in json.dumps(run["pipeline_spec"])


def test_strangers_are_left_alone(kfp: KfpApi, tmp_path: Path) -> None:
    apply(tmp_path, HOURLY)
    (experiment,) = kfp.experiments
    kfp.recurring["x"] = {
        "recurring_run_id": "x",
        "display_name": "mine",
        "status": "ENABLED",
        "experiment_id": experiment,
    }
    apply(tmp_path)
    assert [run["status"] for run in kfp.recurring.values()] == ["DISABLED", "ENABLED"]


def test_a_failure_in_between_leaves_the_old_schedule(
    kfp: KfpApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply(tmp_path, HOURLY)
    answer = kfp.handle

    def without_new_ones(verb: str, path: str, query: dict[str, list[str]], body: dict[str, Any]) -> dict[str, Any]:
        if verb == "POST" and path.endswith("/recurringruns"):
            raise Refused(400, "planted")
        return answer(verb, path, query, body)

    monkeypatch.setattr(kfp, "handle", without_new_ones)
    changed = {**HOURLY, "parameters": {"policy": "nightly"}}
    result = CliRunner().invoke(app, ["schedule", "apply", write(tmp_path, changed)])
    assert (result.exit_code, "planted" in result.stderr) == (1, True)
    assert enabled(kfp) == {"retraining": HOURLY["cron"]}


def test_list_and_remove(kfp: KfpApi, tmp_path: Path) -> None:
    apply(tmp_path, HOURLY)
    apply(tmp_path, {**HOURLY, "cron": "0 5 * * * *"})
    rows = json.loads(CliRunner().invoke(app, ["schedule", "list", "--json"]).stdout)
    assert sorted((row["name"], row["enabled"]) for row in rows) == [("retraining", False), ("retraining", True)]
    assert CliRunner().invoke(app, ["schedule", "remove", "retraining"]).exit_code == 0
    assert kfp.recurring == {}
    missing = CliRunner().invoke(app, ["schedule", "remove", "retraining"])
    assert missing.exit_code == 1
    assert "there is no schedule 'retraining'" in missing.stderr


def test_names_of_pipelines_are_those_there_are() -> None:
    assert set(SCHEDULED) == set(PIPELINES)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cron": "0 * * * *"}, "has 5 fields; Kubeflow wants 6, seconds first: write '0 0 * * * *'"),
        ({"cron": "hourly"}, "has 1 fields; expected 6: second minute hour"),
        ({"cron": "0 61 * * * *"}, "cannot be kept"),
        ({"cron": "0 0 0 31 2 *"}, "cannot be kept"),
        ({"pipeline": "deploy"}, "pipeline 'deploy' is none of training, retraining, tokenizer_refresh"),
        ({"name": "Über"}, "give a name of lower-case letters"),
        ({"parameters": {"run_id": 7}}, "run_id=7 is no text; put the value in quotes"),
        ({"when": "now"}, "has when, which nobody reads"),
        ({"name": 7}, "give a name of lower-case letters"),
        ({"parameters": ["policy"]}, "expected name: value pairs"),
        ({"parameters": {"polcy": "nightly"}}, "pipeline retraining has no polcy"),
        ({"parameters": {"policy": "sometimes"}}, "'retraining', parameter policy: policy 'sometimes' is unknown"),
        (
            {"parameters": {"preset": "tinyy"}},
            "'retraining', parameter preset: unknown preset 'tinyy'; the",
        ),
        (
            {"parameters": {"overrides": "{x"}},
            "'retraining', parameter overrides: overrides '{x' are not a JSON",
        ),
        ({"parameters": {"overrides": '{"pretrain.epoch": 1}'}}, "parameter overrides: the recipe has no field"),
        ({"parameters": {"canary": "7"}}, "'retraining', parameter canary: a canary of share 7.0"),
        ({"parameters": {"canary": "some"}}, "'retraining', parameter canary: canary 'some' is neither a share nor"),
        ({"parameters": {"base": "../x"}}, "'retraining', parameter base: '../x' is neither an alias nor a version"),
        ({"parameters": {"run_id": "../x"}}, "'retraining', parameter run_id: '../x' is no id of a run"),
        ({"parameters": {"end": "soon"}}, "'retraining', parameter end: 'soon' is not a time"),
        (
            {"parameters": {"start": "2026-01-02", "end": "2026-01-01T01:00+01:00"}},
            "'retraining', parameter end 2026-01-01T01:00:00+01:00 is not after",
        ),
    ],
)
def test_bad_schedules_are_refused_and_change_nothing(
    kfp: KfpApi, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    result = CliRunner().invoke(app, ["schedule", "apply", write(tmp_path, WEEKLY, {**HOURLY, **change})])
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert kfp.headers == []


def test_parameters_that_can_be_are_kept_with_a_zone_in_every_time(tmp_path: Path) -> None:
    given = {"policy": '{"when": "on_drift"}', "canary": "0.1", "preset": "small", "overrides": '{"dropout": 0}'}
    schedule = {**HOURLY, "parameters": {**given, "start": "2026-01-01", "end": "2026-01-02T00:00+01:00"}}
    arguments = ["schedule", "apply", write(tmp_path, schedule), "--home", str(tmp_path)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    times = {"start": "2026-01-01T00:00:00+00:00", "end": "2026-01-02T00:00:00+01:00"}
    assert kept(tmp_path).schedules[0].parameters == {**given, **times}


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_bytes(b"\xff\xfe\x00")
    result = CliRunner().invoke(app, ["schedule", "apply", str(tmp_path / "s.yaml"), "--home", str(tmp_path / "home")])
    assert (result.exit_code, "it is no UTF-8 text" in " ".join(result.stderr.split())) == (2, True)


def test_a_damaged_store_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "schedules.json").write_text("{")
    with pytest.raises(BadSchedule, match=r"schedules.json is damaged .* remove it"):
        kept(tmp_path)


def test_looking_at_no_schedules_makes_nothing(tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    assert "there are no schedules" in CliRunner().invoke(app, ["schedule", "list", "--home", home]).stdout
    assert CliRunner().invoke(app, ["schedule", "remove", "nightly", "--home", home]).exit_code == 1
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("schedules: [", "is no YAML"),
        ("[]", "holds no list `schedules`"),
        ("schedules: [hourly]", "expected name, pipeline, cron"),
        ("schedules: [{name: a}]", "lacks cron, pipeline"),
        ("schedules: []\nprofil: gpu", "has profil, which nobody reads"),
        ("schedules: []\nobjects: {secrets: a}", "has secrets, which nobody reads"),
        ("schedules: []\nobjects: [secret]", "expected names"),
        ("schedules: []\nobjects: {secret: 5}", "expected names"),
    ],
)
def test_files_that_are_no_schedules(text: str, words: str) -> None:
    with pytest.raises(BadSchedule, match=words):
        parse(text, "f.yaml")


def test_a_name_that_comes_twice() -> None:
    with pytest.raises(BadSchedule, match="names retraining twice"):
        parse(json.dumps({"schedules": [HOURLY, HOURLY]}), "f.yaml")


# On one machine ------------------------------------------------------------------------------------------------------


def test_schedules_of_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEREC_KFP_ENDPOINT", raising=False)
    settings.cache_clear()
    home = ["--home", str(tmp_path / "home")]
    file = write(tmp_path, HOURLY, WEEKLY)
    assert CliRunner().invoke(app, ["schedule", "apply", file, *home]).exit_code == 0
    rows = json.loads(CliRunner().invoke(app, ["schedule", "list", "--json", *home]).stdout)
    assert [(row["name"], row["enabled"]) for row in rows] == [("retraining", True), ("tokenizer", True)]
    assert CliRunner().invoke(app, ["schedule", "remove", "retraining", *home]).exit_code == 0
    assert [each.name for each in kept(tmp_path / "home").schedules] == ["tokenizer"]


@given(st.datetimes(datetime(2026, 1, 1), datetime(2027, 1, 1)), st.sampled_from(["0 0 * * * *", "0 30 3 * * 0"]))
def test_the_next_time_is_after_now_and_the_first(naive: datetime, cron: str) -> None:
    now = naive.replace(tzinfo=UTC)
    schedule = Schedule(name="a", pipeline="training", cron=cron)
    following = schedule.following(now)
    assert now < following <= now + timedelta(days=7)
    assert schedule.following(following - timedelta(seconds=1)) == following


def test_the_scheduler_runs_what_is_due_once_and_goes_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time moves by what is slept; a run takes 90 minutes, so that one hour is missed, and fails the first time."""
    CliRunner().invoke(app, ["schedule", "apply", write(tmp_path, HOURLY), "--home", str(tmp_path)])
    clock = [datetime(2026, 1, 1, 0, 59, 50, tzinfo=UTC)]
    runs: list[tuple[str, dict[str, str]]] = []

    class Enough(Exception):
        pass

    def sleep(seconds: float) -> None:
        clock[0] += timedelta(seconds=seconds)

    def run(pipeline: str, arguments: dict[str, str], log: Path) -> None:
        if len(runs) == 2:
            raise Enough
        runs.append((pipeline, arguments))
        clock[0] += timedelta(minutes=90)
        if len(runs) == 1:
            raise PipelineFailed("it failed")

    monkeypatch.setattr(scheduler.time, "sleep", sleep)
    monkeypatch.setattr(scheduler, "run", run)
    said: list[str] = []
    with pytest.raises(Enough):
        scheduler.watch(tmp_path, said.append, lambda: clock[0])
    assert runs == [
        ("retraining", {"policy": "on_drift", "run_id": "retraining-20260101010000"}),
        ("retraining", {"policy": "on_drift", "run_id": "retraining-20260101030000"}),
    ]
    assert any("it failed" in line for line in said)


def test_one_scheduler_a_folder(tmp_path: Path) -> None:
    with scheduler._alone(tmp_path), pytest.raises(scheduler.AlreadyScheduling, match="stop it first"):
        scheduler.watch(tmp_path, lambda line: None)
