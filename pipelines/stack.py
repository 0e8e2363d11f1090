"""The local platform on one machine: ``up``, ``down``, ``status``, ``activate`` for what pipelines.services declares.

State lives in the home folder (pipelines.state), with ``logs/<service>.log`` and one folder a service. Nobody
supervises: services run detached, ``status`` sees a crash and the next ``up`` starts what is dead, on the same ports,
because the others know it by them.

Left out: restarts on their own accord, limits on memory, several stacks sharing one home.
"""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from features.settings import settings
from pipelines import processes
from pipelines.ports import choose_ports
from pipelines.services import PROJECT, SERVICES, Service, Site, exports, fetch_json
from pipelines.state import Entry, StackError, entries, locked, marker, record
from pipelines.state import site as site_of

DATA = ("s3", "valkey", "collector", "feast", "bundles", "evidently", "served", "work", "ray", "loop")
"""Folders of a home that hold data and can be removed together."""
GRACE = 12.0  # seconds a service has to end in order; the collector uploads what it holds

Progress = Callable[[str, str], None]  # service, what happened to it


@dataclass(frozen=True, kw_only=True)
class Health:
    """One service now; ``state`` is healthy, unhealthy (runs, does not answer) or dead."""

    service: str
    state: str
    address: str
    pid: int
    uptime_s: float
    memory_bytes: int
    log: str


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model of the model server; ``reason`` says why it is not ready, or why it keeps an older version."""

    ready: bool
    version: str | None
    alias: str
    reason: str


# Up ----------------------------------------------------------------------------------------------------------------


def up(
    home: Path,
    only: Collection[str] = (),
    *,
    ports: Mapping[str, int] | None = None,
    progress: Progress = lambda service, what: None,
    services: Mapping[str, Service] = SERVICES,
) -> list[str]:
    """Starts what does not run yet of ``only`` (all by default) and what it needs; returns the names it started.

    ``ports`` fixes the first port of a service. When one fails, or on Ctrl-C, everything this call started is stopped
    and StackError says which, why, and the end of its log.
    """
    home = home.resolve()
    wanted = with_needs(only or usual(services), services)
    (home / "logs").mkdir(parents=True, exist_ok=True)
    with locked(home):
        known = entries(home)
        starting = [name for name in wanted if name not in known or not known[name].recorded.process()]
        if "predictor" in starting and "server" in wanted and "server" not in starting:
            raise StackError(
                "the model server runs as one process already", "stop it first: `onerec down --only server`"
            )
        for name in starting:  # what a dead leader left behind would hold its ports
            processes.end([(known[name].recorded if name in known else None, marker(home, name))], grace=1)
        site = replace(site_of(home, known), ports=choose_ports(known, starting, dict(ports or {}), services))
        try:
            _start(site, wanted, starting, known, progress, services)
        except BaseException:
            progress("", "stopping what was started")
            _stop(home, starting, known, services)
            raise
    return starting


def usual(services: Mapping[str, Service] = SERVICES) -> list[str]:
    """The services that are started when none is named."""
    return [name for name, service in services.items() if not service.optional]


def with_needs(only: Collection[str], services: Mapping[str, Service] = SERVICES) -> list[str]:
    """The named services and those they need, in starting order; StackError on an unknown name."""
    unknown = sorted(set(only) - set(services))
    if unknown:
        raise StackError(f"unknown service {', '.join(unknown)}", f"the services are {', '.join(services)}")
    wanted = set(only)
    while more := {need for name in wanted for need in services[name].needs} - wanted:
        wanted |= more
    return [name for name in services if name in wanted]


def _start(
    site: Site,
    wanted: list[str],
    starting: list[str],
    known: dict[str, Entry],
    progress: Progress,
    services: Mapping[str, Service],
) -> None:
    """Starts each service as soon as those it needs are healthy, until all ``wanted`` are, and are at the end still."""
    waiting, ready = list(wanted), set[str]()
    begun: dict[str, float] = {}
    tries = dict.fromkeys(starting, 0)
    while waiting:
        for name in waiting.copy():
            service = services[name]
            if not ready.issuperset(service.needs):
                continue
            if name not in begun:
                begun[name] = time.monotonic()
                if name in starting:
                    progress(name, "starting" if not tries[name] else "ended while starting; once more")
                    tries[name] += 1
                    known[name] = _launch(site, service)
                    record(site.home, known)
            if service.healthy(site):
                service.started(site)
                waiting.remove(name)
                ready.add(name)
                took = f" after {time.monotonic() - begun[name]:.1f} s"
                progress(name, f"healthy at {known[name].address}" + (took if name in starting else ", was up"))
            elif tries.get(name, service.tries) < service.tries and not known[name].recorded.process():
                processes.end([(known[name].recorded, marker(site.home, name))], grace=1)
                del begun[name]
            else:
                _check_start(known[name], service, time.monotonic() - begun[name])
        _check_alive({name: known[name] for name in ready}, services)
        time.sleep(0.05)
    _look_again(site, {name: known[name] for name in wanted}, services)


def _look_again(site: Site, started: Mapping[str, Entry], services: Mapping[str, Service]) -> None:
    """Returns when all ``started`` are healthy at one look: the first may be ill by the time the last is well."""
    began = time.monotonic()
    while unwell := [name for name in started if not services[name].healthy(site)]:
        _check_alive(started, services)
        for name in unwell:
            _check_start(started[name], services[name], time.monotonic() - began)
        time.sleep(0.05)
    _check_alive(started, services)  # what answers on its port may be another's


def _check_alive(started: Mapping[str, Entry], services: Mapping[str, Service]) -> None:
    """Raises StackError about the first of ``started`` whose process ended after it was healthy."""
    for name, entry in started.items():
        if not entry.recorded.process():
            _check_start(entry, services[name], 0.0, ended="was healthy, then ended")


def _launch(site: Site, service: Service) -> Entry:
    site.folder(service.name).mkdir(parents=True, exist_ok=True)
    log = site.home / "logs" / f"{service.name}.log"
    service.prepare(site)
    command = service.command(site)
    environment = {"DO_NOT_TRACK": "1", **exports(site), **service.environment(site)}
    # The services import this project's packages wherever they run.
    path = [str(PROJECT), *(str(Path(part).resolve()) for part in os.environ.get("PYTHONPATH", "").split(":") if part)]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path))
    try:
        recorded = processes.start(
            command,
            cwd=site.folder(service.name),
            log=log,
            environment=environment,
            marker=marker(site.home, service.name),
        )
    except FileNotFoundError:
        raise StackError(
            f"{service.name} cannot start: the program {command[0]!r} is not installed",
            f"{service.hint or 'it comes with the project'}; `make install` installs everything",
        ) from None
    return Entry(
        pid=recorded.pid,
        create_time=recorded.create_time,
        ports=dict(site.ports[service.name]),
        address=site.address(service.name),
        log=str(log),
        command=command,
    )


def _check_start(entry: Entry, service: Service, waited: float, ended: str = "ended while starting") -> None:
    alive = entry.recorded.process()
    if alive and waited < service.patience:
        return
    what = f"does not answer on {entry.address} after {waited:.0f} s" if alive else ended
    last = "\n".join(f"  | {line}" for line in processes.tail(Path(entry.log), 12)) or "  | (nothing)"
    raise StackError(
        f"{service.name} {what}; the end of {entry.log}:\n{last}",
        "`onerec doctor` looks for what is missing" + (f"; {service.hint}" if service.hint else ""),
    )


# Down --------------------------------------------------------------------------------------------------------------


def down(home: Path, only: Collection[str] = (), *, services: Mapping[str, Service] = SERVICES) -> list[str]:
    """Stops the recorded services (or ``only`` these) and everything they spawned; returns the names that ran."""
    home = home.resolve()
    if not home.exists():
        return []
    with locked(home):
        known = entries(home)
        names = [name for name in services if name in only or not only]
        return _stop(home, names, known, services)


def _stop(home: Path, names: Collection[str], known: dict[str, Entry], services: Mapping[str, Service]) -> list[str]:
    families = {
        name: (known[name].recorded if name in known else None, marker(home, name))
        for name in services
        if name in names
    }
    ran = [name for name, family in families.items() if processes.family(*family)]
    needed = {need for name in names for need in services[name].needs}
    with _undisturbed():
        # Those who need others end first, so that the collector can still upload.
        processes.end([family for name, family in families.items() if name not in needed], GRACE)
        processes.end([family for name, family in families.items() if name in needed], GRACE)
        _forget(home, names, known, services)
    return ran


def _forget(home: Path, names: Collection[str], known: dict[str, Entry], services: Mapping[str, Service]) -> None:
    """Strikes ended services from the record and removes what they left outside their folders."""
    if any(name in known for name in names):
        site = site_of(home, known)
        for name in names:
            if name in known:
                _sweep(services[name].litter(site))
                del known[name]
    record(home, known)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C, from an impatient user, must not cut a tear-down short."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _sweep(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


# Looking and using -------------------------------------------------------------------------------------------------


def status(home: Path, *, services: Mapping[str, Service] = SERVICES) -> list[Health]:
    """How each recorded service is now; empty when nothing was started in ``home``."""
    home = home.resolve()
    known = entries(home)
    site = site_of(home, known) if known else None
    rows = []
    for name in (name for name in services if name in known):
        entry = known[name]
        process = entry.recorded.process()
        alive = processes.family(entry.recorded, marker(home, name)) if process else []
        state = "dead" if not process or not site else "healthy" if services[name].healthy(site) else "unhealthy"
        rows.append(
            Health(
                service=name,
                state=state,
                address=entry.address,
                pid=entry.pid,
                uptime_s=max(0.0, time.time() - entry.create_time) if process else 0.0,
                memory_bytes=processes.memory(alive),
                log=entry.log,
            )
        )
    return rows


def wipe(home: Path) -> None:
    """Stops what runs in ``home`` and removes its data: objects, events, features, models, reports; logs stay.

    Raises StackError, and removes nothing, where folders of these names are in a place that never was a home.
    """
    found = [name for name in DATA if (home / name).exists()]
    if found and not (home / "credentials.json").exists():
        raise StackError(
            f"{home} holds {', '.join(found)}, but no local services were ever started in it; nothing was removed",
            "choose another folder with --home",
        )
    down(home)
    for name in DATA:
        shutil.rmtree(home / name, ignore_errors=True)


def strays(home: Path, *, services: Mapping[str, Service] = SERVICES) -> list[int]:
    """Pids of processes started for ``home`` whose service is not recorded there; ``down`` ends them."""
    home = home.resolve()
    return [p.pid for name in set(services) - set(entries(home)) for p in processes.family(None, marker(home, name))]


def models(home: Path) -> dict[str, ServedModel]:
    """What the model server says of its models; empty when it does not run or does not answer."""
    entry = entries(home.resolve()).get("server")
    if entry is None or not entry.recorded.process():
        return {}
    report = fetch_json(f"http://{entry.address}/onerec/status") or {}
    return {
        name: ServedModel(ready=about["ready"], version=about["version"], alias=about["alias"], reason=about["reason"])
        for name, about in report.get("models", {}).items()
    }


def activate(home: Path, needs: Collection[str] = ()) -> None:
    """Points this process, and those it starts, at the running stack (ONEREC_* and RAY_* variables).

    In a pod there is no stack: where the home has none and the environment names an object store, that stays as it is.
    Raises StackError when the stack, or one of ``needs`` (all that were started by default), does not run.
    Call it before importing Ray, which reads its variables on import.
    """
    home = home.resolve()
    known = entries(home)
    if not known and "ONEREC_S3_ENDPOINT" in os.environ:
        return
    if not known:
        raise StackError(f"the local services of {home} are not up", "start them with `onerec up`")
    dead = [name for name in (needs or known) if name not in known or not known[name].recorded.process()]
    if dead:
        raise StackError(
            f"{', '.join(dead)} of {home} {'does' if len(dead) == 1 else 'do'} not run",
            "`onerec up` starts what is missing; `onerec logs SERVICE` shows why it ended",
        )
    os.environ.update(exports(site_of(home, known)))
    settings.cache_clear()


@contextmanager
def running(
    home: Path, only: Collection[str] = (), *, progress: Progress = lambda service, what: None, **options: Any
) -> Iterator[None]:
    """The stack for the length of the block, activated; at the end stops what it started itself, nothing else."""
    before = dict(os.environ)
    started = up(home, only, progress=progress, **options)
    try:
        activate(home, with_needs(only, options.get("services", SERVICES)))
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)
        settings.cache_clear()
        if started:
            down(home, started, **{key: value for key, value in options.items() if key == "services"})
