"""What could keep the local platform from working here, each finding with its mend.

Looks only; changes nothing. Left out: GPUs (the local profile trains on the CPU) and anything in a cluster.
"""

import os
import platform
import resource
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.version import Version

from pipelines import processes, stack
from pipelines.services import PROJECT, SERVICES, Site

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding; ``verdict`` is ok, warning (works, but) or failed."""

    name: str
    verdict: str
    found: str
    mend: str = ""


def examine(home: Path, project: Path = PROJECT) -> list[Check]:
    """All findings about this machine, this Python and the stack in ``home``."""
    home = home.resolve()
    return [
        _python(),
        *_packages(project),
        *_binaries(),
        *_machine(),
        *_space(home),
        _ports(),
        *_proxy(),
        *_credentials(home),
        *_services(home),
    ]


def _check(name: str, fine: bool, found: str, mend: str, *, otherwise: str = "failed") -> Check:
    return Check(name=name, verdict="ok" if fine else otherwise, found=found, mend="" if fine else mend)


def _python() -> Check:
    mend = "install Python 3.11 and run `make install PYTHON=/path/to/python3.11`"
    return _check("python", sys.version_info[:2] == (3, 11), f"{platform.python_version()} at {sys.executable}", mend)


def _packages(project: Path) -> Iterator[Check]:
    constraints, pyproject = project / "constraints.txt", project / "pyproject.toml"
    if not constraints.exists() or not pyproject.exists():
        yield Check(name="packages", verdict="ok", found="installed without a source tree; nothing to compare with")
        return
    table = tomllib.loads(pyproject.read_text())["project"]
    wanted = [*table["dependencies"], *(item for extra in table["optional-dependencies"].values() for item in extra)]
    needed = {_plain(Requirement(item).name) for item in wanted} - {_plain(table["name"])}
    needed -= {_plain(Requirement(item).name) for item in table["optional-dependencies"].get("dev", [])}
    pins = {
        _plain(line.name): str(next(iter(line.specifier)).version)
        for line in map(Requirement, _lines(constraints))
        if line.specifier
    }
    installed = {_plain(item.metadata["Name"]): item.version for item in metadata.distributions()}
    missing = sorted(needed - set(installed))
    yield _check(
        "packages", not missing, f"missing {', '.join(missing)}" if missing else "all installed", "make install"
    )
    other = [
        f"{name} {installed[name]} (pinned {pin})"
        for name, pin in sorted(pins.items())
        if name in installed and Version(installed[name]).public != Version(pin).public
    ]
    found = f"{len(pins)} pins, " + (f"{len(other)} differ: " + "; ".join(other[:5]) if other else "all kept")
    yield _check("versions", not other, found, "make install (in a fresh .venv)", otherwise="warning")


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _binaries() -> Iterator[Check]:
    for name in ("s3", "valkey", "ray", "evidently"):
        service = SERVICES[name]
        ports = {name: dict.fromkeys(service.ports, 0)}
        program = service.command(Site(home=Path("/"), ports=ports, credentials={}))[0]
        path = shutil.which(program)
        yield _check(f"program of {name}", path is not None, path or f"{program} is missing", service.hint)


def _machine() -> Iterator[Check]:
    cores, total = psutil.cpu_count() or 1, psutil.virtual_memory()
    yield _check("cores", cores >= 2, str(cores), "works, slowly; two or more are better", otherwise="warning")
    found = f"{total.available / GB:.1f} GB available of {total.total / GB:.1f}"
    yield _check(
        "memory", total.available > 4 * GB, found, "close other programs: 4 GB are needed", otherwise="warning"
    )
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    fast = sorted(flags & {"avx512_bf16", "amx_bf16"})
    mend = "training in bf16 is emulated here and slower; nothing to mend on this processor"
    yield _check("bf16", bool(fast), ", ".join(fast) or "no AVX512-BF16 or AMX", mend, otherwise="warning")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield _check("open files", soft >= 1024, f"limit {soft}", f"ulimit -n {min(hard, 65536)}", otherwise="warning")


def _space(home: Path) -> Iterator[Check]:
    existing = next(path for path in (home, *home.parents) if path.exists())
    writable = os.access(existing, os.W_OK)
    yield _check("home", writable, f"{home}" + ("" if writable else " cannot be written"), "choose another with --home")
    places = {
        "disk": (existing, 5.0),
        "temporary folder": (Path("/tmp"), 1.0),
        "shared memory": (Path("/dev/shm"), 0.5),
    }
    for name, (path, needed) in places.items():
        if path.exists():
            free = shutil.disk_usage(path).free / GB
            mend = (
                f"free some: {needed:g} GB are needed" if name != "shared memory" else "in a container: --shm-size=1g"
            )
            fine = free > needed
            yield _check(
                name, fine, f"{free:.1f} GB free at {path}", mend, otherwise="failed" if free < 0.2 else "warning"
            )


def _ports() -> Check:
    needed = sum(len(service.ports) for service in SERVICES.values())
    try:
        free = len(list(processes.free_ports(needed)))
    except OSError:
        free = 0
    return _check("ports", free == needed, f"{free} of {needed} free ones found", "something holds the loopback ports")


def _proxy() -> Iterator[Check]:
    proxies = sorted(name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy"))
    if proxies:
        spared = "127.0.0.1" in os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
        mend = "export no_proxy=127.0.0.1,localhost (the services themselves are given it)"
        yield _check("proxy", spared, f"{', '.join(proxies)} set", mend, otherwise="warning")


def _credentials(home: Path) -> Iterator[Check]:
    path = home / "credentials.json"
    if path.exists():
        mode = path.stat().st_mode & 0o777
        yield _check("credentials", mode == 0o600, f"{path} has mode {mode:o}", f"chmod 600 {path}")


def _services(home: Path) -> Iterator[Check]:
    try:
        rows = stack.status(home) if home.exists() else []
    except stack.StackError as error:
        yield Check(name="services", verdict="failed", found=str(error), mend=error.hint)
        return
    if not rows:
        yield Check(name="services", verdict="ok", found="not started; `onerec up` starts them")
    for row in rows:
        mend = f"`onerec logs {row.service}` shows why; `onerec up` starts what is dead"
        yield _check(f"service {row.service}", row.state == "healthy", f"{row.state} at {row.address}", mend)
    if strays := stack.strays(home):
        found = f"unrecorded processes of {home}: {', '.join(map(str, strays))}"
        yield Check(name="strays", verdict="failed", found=found, mend="onerec down")
