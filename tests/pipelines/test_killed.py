"""A retraining run that is killed in every one of its steps, resumed by its id each time, ends as one left alone.

The real pipeline in ``kfp.local`` (its tasks forked: ``forked_local``) on real storage, and SIGKILL to the whole group
of processes: no handler runs, no ``finally``. Content is compared by digest: the bundle's, and that of every stage that
makes part of it.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from features.runs import Run
from features.settings import Settings, settings
from features.storage import Storage, connect
from features.world.simulator import Simulator, SimulatorConfig
from models.bundle import list_versions, read_alias, read_manifest
from models.release import evaluate_run, publish_run
from models.stages import align_run, pretrain_run, tokenize_run
from models.window import prepare_all
from monitoring.quality import Decision, keep
from pipelines.ingest import ingest
from pipelines.local import COLOUR, TASK

PROJECT = Path(__file__).resolve().parents[2]
RUN = "retrain-killed"
OVERRIDES = json.dumps(
    {
        "tokenizer.codes": 8,
        "pretrain.max_steps": 60,
        "incremental.max_steps": 20,
        "align.max_steps": 10,
        "reward.max_steps": 10,
        "reward.least_auc": 0,
    }
)
STAGES = ("data", "tokenizer", "pretrain", "reward", "align", "evaluate")
"""Those whose content makes the bundle."""
Sign = Callable[[Storage, Path], bool]


def always(storage: Storage, home: Path) -> bool:
    return True


def works_on(stage: str) -> Sign:
    return lambda storage, home: any((home / "work").glob(f"{RUN}-{stage}-*"))


def stored(prefix: str) -> Sign:
    return lambda storage, home: any(True for _ in storage.keys(prefix))


def server_runs(storage: Storage, home: Path) -> bool:
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "models.serving" in child.cmdline():
                return True
    return False


KILLED_WHEN: dict[str, Sign] = {
    "prepare-window": stored(f"runs/{RUN}/data/"),
    "detect-drift": always,
    "should-retrain": always,
    "tokenize": works_on("tokenizer"),
    "pretrain": works_on("pretrain"),
    "align": works_on("align"),
    "evaluate": server_runs,
    "bless": always,
    "publish": stored(f"runs/{RUN}/publish/"),
    "record-outcome": always,
}
"""Every task, and the sign that its work is under way; else it is killed while it starts."""


class Attempt:
    """One start of the pipeline; killed in ``task`` as soon as ``sign`` shows, which ``killed`` then says."""

    def __init__(self, log: Path, task: str = "", sign: Sign = always) -> None:
        self.log, self.task, self.sign = log, task, sign
        self.tasks: list[str] = []
        self.killed = ""

    def run(self, arguments: dict[str, str], storage: Storage, home: Path) -> int:
        """Plays it to its end; returns the exit code."""
        root = tempfile.mkdtemp(prefix="onerec-kfp-")
        command = [sys.executable, "-m", "forked_local", "retraining", json.dumps(arguments), root]
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        with child, self.log.open("w") as log:
            assert child.stdout is not None
            for line in child.stdout:
                log.write(line)
                if found := TASK.search(COLOUR.sub("", line)):
                    self.tasks.append(found[1])
                    if found[1] == self.task:
                        threading.Thread(target=self._kill, args=(child.pid, storage, home)).start()
        return child.returncode

    def _kill(self, group: int, storage: Storage, home: Path) -> None:
        while self.tasks[-1] == self.task:
            if self.sign(storage, home):
                os.killpg(group, signal.SIGKILL)
                self.killed = self.task
                return
            time.sleep(0.01)


@contextmanager
def platform(storage: Storage, home: Path, patch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """``settings()`` of this process and its children: another bucket, another home."""
    with patch.context() as context:
        context.setenv("ONEREC_BUCKET", storage.bucket)
        context.setenv("ONEREC_HOME", str(home))
        settings.cache_clear()
        yield connect()
    settings.cache_clear()


def first_model(patch: pytest.MonkeyPatch, end: str) -> None:
    """What the run goes on from, made by the same stages in this process."""
    options = {"preset": "tiny", "overrides": OVERRIDES}
    patch.setattr("models.infra.validate", lambda candidate: {"passed": [], "failed": []})
    _, data = prepare_all("first", start="", end=end)
    tokens, _, _ = tokenize_run("first", data=data, base="", **options)
    pretrained = pretrain_run("first", tokens=tokens, base="", **options)
    evaluate_run("first", aligned=align_run("first", pretrained=pretrained, **options), base="")
    about = Run(connect(), "first").summary("evaluate")["bundle"]
    keep(connect(), "runs/first", Decision(blessed=True, passed=(), failed=(), **about))
    publish_run("first", alias="production", base="")


def copied(source: Storage, target: Storage) -> Storage:
    for key in source.keys(""):
        target.put(key, source.get(key))
    return target


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_run_killed_at_every_step_ends_with_the_same_content(
    environment: Settings,
    s3: Storage,
    new_bucket: Callable[[], Storage],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT), str(PROJECT / "tests/support")]))
    (tmp_path / "scratch").mkdir()
    world = Simulator(SimulatorConfig(users=80, items=120, history_days=5))
    ingest(world.history(), s3, environment.home)
    midnights = [(world.start() - timedelta(days=days)).isoformat() for days in (5, 3, 1, 0)]
    with monkeypatch.context() as patch:
        first_model(patch, midnights[2])
    window = dict(zip(("start", "reference_start", "current_start", "end"), midnights, strict=True))
    arguments = {"run_id": RUN, "base": "production", "preset": "tiny", "overrides": OVERRIDES, **window}

    alone, killed = copied(s3, new_bucket()), copied(s3, new_bucket())
    with platform(alone, tmp_path / "alone", monkeypatch) as storage:
        whole = Attempt(tmp_path / "alone.log")
        assert whole.run(arguments, storage, tmp_path / "alone") == 0, whole.log.read_text()[-3000:]
    assert set(whole.tasks) == set(KILLED_WHEN), "the whole pipeline ran: the test knows every step"

    happened, home = [], tmp_path / "killed"
    with platform(killed, home, monkeypatch) as storage:
        for task, sign in KILLED_WHEN.items():
            attempt = Attempt(tmp_path / f"{task}.log", task, sign)
            assert attempt.run(arguments, storage, home) == -signal.SIGKILL, attempt.log.read_text()[-3000:]
            happened.append(attempt.killed)
        last = Attempt(tmp_path / "resumed.log")
        assert last.run(arguments, storage, home) == 0, last.log.read_text()[-3000:]
    assert happened == list(KILLED_WHEN), "killed in every step in turn"

    versions = [read_alias(each, "production") for each in (alone, killed)]
    assert versions[0] == versions[1] is not None
    assert len(list_versions(killed)) == 2, "the model it went on from and the new one, no third"
    digests = [read_manifest(each, versions[0])["digest"] for each in (alone, killed)]
    assert digests[0] == digests[1]
    for stage in STAGES:
        done = [Run(each, RUN).done(stage) for each in (alone, killed)]
        assert done[0]["digest"] == done[1]["digest"], stage
    outcome = killed.get_json(f"runs/{RUN}/outcome.json")
    assert (outcome["state"], outcome["version"]) == ("SUCCEEDED", versions[0])
    assert killed.exists(f"models/onerec/{versions[0]}/records/outcome.json")
