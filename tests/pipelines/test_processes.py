"""Processes are recognised by birth as well as pid, and logs and ports behave."""

import os
import socket
import sys
import time
from pathlib import Path

import psutil
from hypothesis import given
from hypothesis import strategies as st

from pipelines import processes
from pipelines.processes import Recorded

SLEEP = [sys.executable, "-c", "print('hello', flush=True); import time; time.sleep(600)"]


def test_started_process_is_detached_and_recognised(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    recorded = processes.start(SLEEP, cwd=tmp_path, log=log, environment={"COLOUR": "red"}, marker="a@here")
    process = recorded.process()
    assert process is not None
    assert os.getsid(process.pid) == process.pid
    assert process.environ()["COLOUR"] == "red"
    assert Recorded(pid=recorded.pid, create_time=recorded.create_time - 100).process() is None
    processes.end([(recorded, "a@here")], grace=5)
    assert recorded.process() is None


def test_log_of_the_previous_start_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    for word in ("first", "second"):
        recorded = processes.start(["echo", word], cwd=tmp_path, log=log, environment={}, marker="a@here")
        psutil.wait_procs([p for p in [recorded.process()] if p], timeout=5)
    deadline = time.monotonic() + 5
    while not log.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert log.read_text() == "second\n"
    assert (tmp_path / "a.log.1").read_text() == "first\n"


def test_no_family_without_a_process() -> None:
    assert processes.family(None, "nobody@nowhere") == []
    me = psutil.Process()
    recorded = Recorded(pid=me.pid, create_time=me.create_time())
    assert me not in processes.family(recorded, "nobody@nowhere")


def test_ports_are_distinct_free_and_seen_when_taken() -> None:
    ports = list(processes.free_ports(50))
    assert len(set(ports)) == 50
    with socket.create_server(("127.0.0.1", ports[0])):
        assert not processes.is_free(ports[0])
        assert f"pid {os.getpid()}" in processes.owner(ports[0])
    assert processes.is_free(ports[0])


@given(st.lists(st.text("abc é", max_size=30), max_size=30), st.integers(1, 20))
def test_tail_is_the_end(tmp_path_factory, lines: list[str], count: int) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("tail") / "log"
    path.write_text("".join(f"{line}\n" for line in lines))
    assert processes.tail(path, count) == lines[-count:]
    assert processes.tail(path.with_name("absent"), count) == []
