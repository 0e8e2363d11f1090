"""Bad input and misfortune from the command line: a clear message, an exit code that is not 0, nothing half-published.

One platform of real servers (storage, Valkey, model server) lives through all of it; every test mends what it broke.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from features.datasets import load
from features.histories.windows import Limits
from features.settings import Settings
from features.storage import connect
from features.world.simulator import Simulator, SimulatorConfig
from models.bundle import list_versions, publish, read_alias, save, set_alias
from models.onerec_v2 import OneRecV2, V2Config
from models.tokenizer.tokenizer import Tokenizer, TokenizerConfig
from pipelines import processes, stack
from pipelines.__main__ import app
from pipelines.client import Client, ServiceFailed
from pipelines.ingest import ingest

LOG = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
USERS = (
    "user_id,user_active_degree,register_days_range,follow_user_num_range,fans_user_num_range,friend_user_num_range,"
    "is_video_author,onehot_feat0,onehot_feat1"
)
VIDEOS = "video_id,author_id,video_type,upload_dt,video_duration,music_id,tag"


def onerec(*arguments: str, code: int = 0) -> Result:
    """Runs a command in this process; it must end with ``code`` and, when that is not 0, with a clean message."""
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "500"})
    assert result.exit_code == code, f"{arguments}: {result.output}"
    assert "Traceback" not in result.output
    if code and arguments[0] != "status":
        assert result.stderr.count("error: ") == 1
        assert "hint: " in result.stderr
    return result


# Logs --------------------------------------------------------------------------------------------------------------


def write_log(folder: Path, users: int, header: str = LOG) -> Path:
    """A KuaiRand folder in which each of ``users`` watched three videos."""
    folder.mkdir()
    views = [
        f"{user},{video},20220425,0,{1_650_812_741_436 + 1000 * video},1,0,0,0,0,0,0,5000,9000,0,0,0,0,1"
        for user in range(users)
        for video in range(3)
    ]
    (folder / "log_standard_1.csv").write_text("\n".join([header, *views]) + "\n")
    (folder / "user_features_pure.csv").write_text(f"{USERS}\n0,full_active,730+,500+,0,0,1,1,1\n")
    (folder / "video_features_basic_pure.csv").write_text(f"{VIDEOS}\n0,7,NORMAL,2022-04-10,9000.0,99,39\n")
    return folder


def without_file(folder: Path) -> Path:
    write_log(folder, users=2)
    (folder / "user_features_pure.csv").unlink()
    return folder


def with_other_users(folder: Path) -> Path:
    write_log(folder, users=2)
    (folder / "user_features_pure.csv").write_text("user_id,age\n0,1\n")
    return folder


def empty_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def one_file(folder: Path) -> Path:
    folder.write_text(LOG)
    return folder


BAD_LOGS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "unknown path": (lambda folder: folder, "does not exist; give the folder of a downloaded log"),
    "a file": (one_file, "found: a file, not a folder"),
    "empty folder": (empty_folder, "found: nothing); expected KuaiRand: log_standard*.csv"),
    "wrong columns": (
        lambda f: write_log(f, 2, LOG.replace("play_time_ms", "played")),
        "lacks the column play_time_ms",
    ),
    "wrong columns of users": (with_other_users, "lacks the columns user_active_degree, register_days_range"),
    "missing file": (without_file, "holds no user_features*.csv"),
    "empty log": (lambda folder: write_log(folder, 0), "has no rows; expected impressions in log_standard*.csv"),
    "one user": (lambda folder: write_log(folder, 1), "has 1 user ('0'); a recommender is learned from"),
}


@pytest.mark.parametrize("name", BAD_LOGS)
@pytest.mark.parametrize("command", [("ingest",), ("loop", "--days", "1", "--data")])
def test_a_bad_log_is_refused_before_anything_starts(name: str, command: tuple[str, ...], tmp_path: Path) -> None:
    make, words = BAD_LOGS[name]
    path, home = make(tmp_path / "log"), tmp_path / "home"
    result = onerec(*command, str(path), "--home", str(home), code=2)
    assert str(path) in result.stderr
    assert words in result.stderr
    assert not home.exists()


def test_nothing_of_a_one_user_log_is_stored(environment: Settings, tmp_path: Path) -> None:
    dataset = load(write_log(tmp_path / "log", users=1))
    with pytest.raises(ValueError, match="has 1 user; a recommender is learned from"):
        ingest(dataset, connect(), environment.home)
    assert list(connect().keys("")) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("loop", "--overrides", "{x"), "overrides '{x' are not a JSON object"),
        (("loop", "--overrides", "[1]"), "expected a JSON object"),
        (("loop", "--overrides", '{"pretrain.epoch": 1}'), "pretrain.epochs"),
        (("loop", "--policy", "sometimes"), "policy 'sometimes' is unknown"),
        (("train", "--start", "soon"), "--start 'soon' is not a time"),
        (("train", "--preset", "huge"), "unknown preset 'huge'; the presets are tiny, small"),
        (("retrain", "--policy", "sometimes"), "policy 'sometimes' is unknown"),
        (("train", "--run-id", "../elsewhere"), "--run-id '../elsewhere' is no id of a run"),
        (("retrain", "--run-id", ""), "--run-id '' is no id of a run"),
        (("canary", "look", "--end", "soon"), "--end 'soon' is not a time"),
        (("recommend", "--user", ""), "--user '' is empty"),
        (("recommend", "--user", "u1", "--select", "luck"), "select is 'luck'; expected one of model, reward, stay"),
        (("loop", "--select", ""), "select is ''; expected one of"),
        (("explain", "--user", "a\nb"), "holds control characters"),
        (("recommend", "--user", "u" * 129), "longer than 128 characters"),
        (("report", "--day", "0001-01-01"), "--day 0001-01-01 is in no log"),
        (("report", "--day", "9999-12-31"), "--day 9999-12-31 is in no log"),
        (
            ("train", "--start", "2026-02-01", "--end", "2026-01-01"),
            "--end 2026-01-01T00:00:00+00:00 is not after --start 2026-02-01T00:00:00+00:00",
        ),
        (("retrain", "--new-days", "30"), "--context-days 21 do not reach back beyond the 30 of --new-days"),
        (("prune", "--days", "-1"), "-1.0 days cannot be kept"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    assert words in onerec(*arguments, "--home", str(tmp_path / "home"), code=2).stderr
    assert not (tmp_path / "home").exists()


# A platform with a model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Storage, Valkey and a model server that serves an untrained model of a small simulated world to its users."""
    home = tmp_path_factory.mktemp("platform").resolve() / "home"
    with stack.running(home, ["server"]):
        world = Simulator(SimulatorConfig(users=12, items=100, history_days=2))
        data = world.history()
        ingest(data, connect(), home)
        tokenizer = Tokenizer.fit(data.items, data.exposures, TokenizerConfig(levels=3, codes=8, dim=8))
        catalogue = tokenizer.catalogue(data.items, data.exposures)
        for seed in (0, 1):
            torch.manual_seed(seed)
            folder = save(
                home / f"made{seed}",
                model=OneRecV2(V2Config(codes=8, levels=3, d_model=16, layers=1, heads=2, kv_groups=1, embed=8)),
                tokenizer=tokenizer,
                catalogue=catalogue,
                limits=Limits(),
                metrics={},
            )
            version = publish(connect(), folder, data_time=world.start())
            set_alias(connect(), "production", version)
        until(lambda: serving(home).version == version)
        yield home


def serving(home: Path) -> stack.ServedModel:
    return stack.models(home)["onerec"]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 30 s"
        time.sleep(0.1)


def recommended(home: Path, user: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(onerec("recommend", "--user", user, "--json", "--home", str(home)).stdout)
    return answer


def kill(home: Path, service: str) -> None:
    process = stack.entries(home)[service].recorded.process()
    assert process is not None
    process.kill()
    process.wait(10)


def test_items_have_titles_sids_and_scores(home: Path) -> None:
    answer = recommended(home, "u00003")
    assert answer["flags"] == []
    assert len(answer["items"]) == 10
    assert all(item["title"] and len(item["sid"]) == 3 for item in answer["items"])
    scores = [item["score"] for item in answer["items"]]
    assert scores == sorted(scores, reverse=True)
    assert f"{answer['model_version']}, answered in " in onerec("recommend", "--user", "u3", "--home", str(home)).stdout


def test_an_unknown_user_gets_a_flagged_answer(home: Path) -> None:
    answer = recommended(home, "nobody")
    assert answer["flags"] == ["cold_user"]
    assert len(answer["items"]) == 10
    assert "nothing is known of this user" in onerec("recommend", "--user", "nobody", "--home", str(home)).stdout


def test_bad_requests_say_what_is_wrong(home: Path) -> None:
    asked = ("recommend", "--home", str(home), "--user")
    assert "onerec, onerec-frozen" in onerec(*asked, "u1", "--model", "two", code=2).stderr
    assert "--user '' is empty" in onerec(*asked, "", code=2).stderr
    assert "no complete bundle '1'" in onerec("promote", "1", "--home", str(home), code=1).stderr


def test_nothing_in_production(home: Path) -> None:
    version, asked = read_alias(connect(), "production"), ("--home", str(home))
    assert version is not None
    connect().remove("models/onerec/aliases/production.json")
    assert "nothing is in production" in onerec("rollback", *asked, code=1).stderr
    assert "nothing is in production to go on from" in onerec("retrain", *asked, code=1).stderr
    frozen = onerec("recommend", "--user", "u1", "--model", "onerec-frozen", *asked, code=1)
    assert "model onerec-frozen is not ready: alias 'frozen' does not exist yet" in frozen.stderr
    assert "model onerec-frozen: not ready" in onerec("status", *asked).stdout
    set_alias(connect(), "production", version)
    assert f"{version} has no parent to go back to" in onerec("rollback", *asked, code=1).stderr


def test_a_failing_step_publishes_nothing(home: Path) -> None:
    """The window holds no exposure: the first task fails; no bundle appears and the alias stays."""
    before = list_versions(connect()), read_alias(connect(), "production")
    window = ("--start", "2026-01-01", "--end", "2026-01-02", "--run-id", "nothing")
    result = onerec("train", *window, "--home", str(home), code=1)
    assert "failed in task 'prepare-data'" in result.stderr
    assert "no exposure lies in" in result.stderr
    assert "nothing was published; once mended, the same command with --run-id nothing" in result.stderr
    assert (list_versions(connect()), read_alias(connect(), "production")) == before


def test_a_corrupt_bundle_is_not_promoted_and_never_served(home: Path) -> None:
    storage, asked = connect(), ("--home", str(home))
    good = read_alias(storage, "production")
    assert good is not None
    (bad,) = set(list_versions(storage)) - {good}
    key = f"models/onerec/{bad}/model.safetensors"
    whole = storage.get(key)
    storage.put(key, whole[:-1] + bytes([whole[-1] ^ 1]))

    refused = onerec("promote", bad, *asked, code=1).stderr
    assert "model.safetensors is corrupt: sha256 is " in refused
    assert "production was not changed" in refused
    assert read_alias(storage, "production") == good

    set_alias(storage, "production", bad)  # by somebody who does not look
    shutil.rmtree(home / "bundles" / bad, ignore_errors=True)
    until(lambda: serving(home).reason != "")
    assert recommended(home, "u00003")["model_version"] == good
    shown = onerec("status", *asked).stdout
    assert f"model onerec: ready, {good}" in shown
    assert f"refused {bad}: bundle {bad}: model.safetensors is corrupt" in shown

    stack.down(home, ["server"])
    stack.up(home, ["server"])
    until(lambda: "refused" in serving(home).reason)
    assert "model onerec: not ready" in onerec("status", *asked).stdout
    assert "model.safetensors is corrupt" in onerec("recommend", "--user", "u1", *asked, code=1).stderr

    onerec("promote", good, *asked)
    until(lambda: serving(home).version == good)
    storage.put(key, whole)


def test_valkey_is_down(home: Path, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", users=2)
    kill(home, "valkey")
    answer = recommended(home, "u00003")
    assert answer["flags"] == ["features_unavailable"]
    assert len(answer["items"]) == 10
    before = list(connect().keys(""))
    assert f"valkey of {home} does not run" in onerec("ingest", str(log), "--home", str(home), code=1).stderr
    assert list(connect().keys("")) == before
    assert "valkey is dead" in onerec("status", "--home", str(home), code=1).stdout
    onerec("up", "--only", "server", "--home", str(home))
    until(lambda: recommended(home, "nobody")["flags"] == ["cold_user"])


def test_object_storage_is_down(home: Path, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", users=2)
    kill(home, "s3")
    answer = onerec("recommend", "--user", "u00003", "--home", str(home))
    assert "S3 at 127.0.0.1" in answer.stderr
    assert "the answer comes from the model in memory" in answer.stderr
    for command in (["ingest", str(log)], ["train"], ["retrain"], ["promote", "1"], ["rollback"], ["bundles", "list"]):
        assert f"s3 of {home} does not run" in onerec(*command, "--home", str(home), code=1).stderr
    until(lambda: "S3 at" in serving(home).reason)
    status = onerec("status", "--home", str(home), code=1).stdout
    assert "s3 is dead" in status
    assert "model onerec: ready" in status
    onerec("up", "--only", "server", "--home", str(home))
    until(lambda: serving(home).reason == "")


def test_a_hanging_server_is_reported(home: Path) -> None:
    process = stack.entries(home)["server"].recorded.process()
    assert process is not None
    process.suspend()
    try:
        stderr = onerec("recommend", "--user", "u1", "--home", str(home), code=1).stderr
        assert "the model server does not answer" in stderr
        assert "server is unhealthy" in onerec("status", "--home", str(home), code=1).stdout
    finally:
        process.resume()


def test_a_collector_that_is_away_is_named(tmp_path: Path) -> None:
    port = next(processes.free_ports(1))
    with Client("", f"http://127.0.0.1:{port}", "token") as client, pytest.raises(ServiceFailed) as failure:
        client.report([{"kind": "impression", "event_time": int(datetime.now().timestamp())}])
    assert f"http://127.0.0.1:{port}/v1/events does not answer (ConnectError)" in str(failure.value)
    assert "onerec status" in failure.value.hint


# Ctrl-C --------------------------------------------------------------------------------------------------------------


def of(home: Path) -> list[psutil.Process]:
    """Live processes that belong to ``home``."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            environment = process.environ()
        except psutil.Error:
            continue
        belongs = environment.get("ONEREC_HOME") == str(home) or environment.get(processes.MARKER, "").endswith(
            f"@{home}"
        )
        if belongs and process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
            found.append(process)
    return found


@pytest.mark.long
def test_ctrl_c_during_the_loop_leaves_nothing(tmp_path: Path) -> None:
    home = (tmp_path / "home").resolve()
    command = [
        sys.executable,
        "-m",
        "pipelines",
        "loop",
        "--fresh",
        "--days",
        "1",
        "--users",
        "12",
        "--home",
        str(home),
    ]
    for _ in range(2):  # the second loop works in what the first one left
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as child:
            assert child.stderr is not None
            assert any("tokenize" in line for line in child.stderr), "the training pipeline began"
            ports = [port for entry in stack.entries(home).values() for port in entry.ports.values()]
            os.killpg(child.pid, signal.SIGINT)
            rest = child.stderr.read()
        assert child.returncode == 130
        assert "interrupted" in rest
        assert "Traceback" not in rest
        assert stack.entries(home) == {}
        assert of(home) == []
        assert all(processes.is_free(port) for port in ports)
