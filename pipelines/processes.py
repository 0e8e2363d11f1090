"""Processes of our own: started detached, recognised later by pid *and* birth time, ended with all they spawned.

A pid alone is never trusted, because the kernel hands it out again. What a service spawned is found in three ways,
since each misses some: children (not those whose parent died), the session (not those that called setsid), and the
marker in the environment (not those that overwrote it to change their titles).
"""

import os
import random
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

MARKER = "ONEREC_STACK"


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A process as written down when it was started."""

    pid: int
    create_time: float

    def process(self) -> psutil.Process | None:
        """The process when it still runs; None when it ended or its pid belongs to another by now."""
        try:
            process = psutil.Process(self.pid)
            # Birth times are counted from the boot time, which moves a little when the clock is set.
            same = abs(process.create_time() - self.create_time) < 5
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


def start(command: list[str], *, cwd: Path, log: Path, environment: Mapping[str, str], marker: str) -> Recorded:
    """Starts ``command`` in a session of its own with its output in ``log`` (the previous log is kept as ``.1``).

    Raises FileNotFoundError when the executable is missing.
    """
    if log.exists():
        log.replace(log.with_suffix(".log.1"))
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**os.environ, **environment, MARKER: marker},
            start_new_session=True,
        )
    return Recorded(pid=child.pid, create_time=psutil.Process(child.pid).create_time())


def family(recorded: Recorded | None, marker: str) -> list[psutil.Process]:
    """Every live process that belongs to the recorded one or carries ``marker``; never this one or its ancestors."""
    leader = recorded.process() if recorded else None
    found = {leader, *leader.children(recursive=True)} if leader else set[psutil.Process]()
    # After the leader's death its pid stays reserved while its session has members, so the session is still ours
    # unless somebody else's process has that pid now.
    session = recorded.pid if recorded and (leader or not _taken(recorded.pid)) else None
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError, PermissionError):
            if (session and os.getsid(process.pid) == session) or process.environ().get(MARKER) == marker:
                found.add(process)
    me = psutil.Process()
    return sorted(found - {me, *me.parents()}, key=lambda process: process.pid)


def _taken(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end(families: Iterable[tuple[Recorded | None, str]], grace: float) -> None:
    """Asks the leaders to stop (SIGTERM), waits ``grace`` seconds for all their processes, kills what is left.

    Only leaders are asked first: one that stops its own children in order must not find them gone.
    """
    families = list(families)
    everyone = {process for recorded, marker in families for process in family(recorded, marker)}
    leaders = [process for recorded, _ in families if recorded and (process := recorded.process())]
    _signal(leaders or everyone, "terminate")
    _signal(leaders, "resume")  # a stopped process would not hear it
    _, stubborn = psutil.wait_procs(leaders, timeout=grace)
    # Whoever was born meanwhile is found by the second look.
    rest = everyone | {process for recorded, marker in families for process in family(recorded, marker)}
    _signal(rest - set(stubborn), "terminate")
    _, alive = psutil.wait_procs(rest - set(stubborn), timeout=2)
    _signal({*alive, *stubborn}, "kill")
    psutil.wait_procs({*alive, *stubborn}, timeout=10)


def _signal(processes: Iterable[psutil.Process], what: str) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            getattr(process, what)()


def memory(processes: Iterable[psutil.Process]) -> int:
    """Resident bytes of all ``processes`` together; pages they share count more than once."""
    total = 0
    for process in processes:
        with suppress(psutil.Error):
            total += process.memory_info().rss
    return total


def free_ports(count: int, host: str = "127.0.0.1") -> Iterator[int]:
    """``count`` distinct ports that nobody listens on, below the range from which the kernel picks for clients."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 12_000):
        if count == 0:
            return
        if is_free(port, host):
            count -= 1
            yield port
    if count:
        raise OSError("no free port between 20000 and 32000")


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen on ``port`` now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def owner(port: int) -> str:
    """Who listens on ``port``, as "name (pid N)", or "another process" when that may not be seen."""
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr
            if listens and tuple(connection.laddr)[1:] == (port,) and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return "another process"


def tail(path: Path, lines: int) -> list[str]:
    """The last ``lines`` lines of a log; empty when there is none."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 400 * lines))
        return file.read().decode(errors="replace").splitlines()[-lines:]
