"""What the local platform remembers in its home folder: ``stack.json`` and ``credentials.json``.

The former holds processes and ports but no secrets. The credentials are made once and kept, because the data in the
home folder belongs to them.
"""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines.processes import Recorded
from pipelines.services import Site

_CREDENTIALS = (
    *("s3_access_key", "s3_secret_key", "redis_password"),
    *("client_token", "server_token", "admin_token", "ray_token"),
)


class StackError(RuntimeError):
    """The local platform cannot do what was asked; ``hint`` says what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One service as written in stack.json."""

    pid: int
    create_time: float
    ports: dict[str, int]
    address: str
    log: str
    command: list[str]

    @property
    def recorded(self) -> Recorded:
        """The process, to be recognised later."""
        return Recorded(pid=self.pid, create_time=self.create_time)


def entries(home: Path) -> dict[str, Entry]:
    """The services recorded in ``home``; empty when nothing was started there."""
    path = home / "stack.json"
    if not path.exists():
        return {}
    try:
        return {name: Entry(**entry) for name, entry in json.loads(path.read_text())["services"].items()}
    except (ValueError, KeyError, TypeError) as error:
        raise StackError(
            f"{path} is damaged ({error})", "remove it, then run `onerec down` to stop what may still run"
        ) from error


def record(home: Path, services: Mapping[str, Entry]) -> None:
    """Writes down ``services``, in one step; removes the file when there is none."""
    path = home / "stack.json"
    if not services:
        path.unlink(missing_ok=True)
        return
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps({"services": {name: asdict(entry) for name, entry in services.items()}}, indent=1))
    draft.replace(path)


def credentials(home: Path) -> dict[str, str]:
    """The stack's credentials; generated on first use into ``credentials.json`` (mode 0600)."""
    path = home / "credentials.json"
    known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    missing = [name for name in _CREDENTIALS if name not in known]
    if missing:
        known |= {name: secrets.token_urlsafe(32) for name in missing}
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(known, file, indent=1)
    path.chmod(0o600)
    return known


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """One ``up`` or ``down`` at a time in ``home``."""
    with (home / "stack.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError(
                f"another `onerec up` or `onerec down` is at work in {home}", "wait for it to end, then try again"
            ) from None
        yield


def marker(home: Path, service: str) -> str:
    """What the processes of ``service`` carry in their environment."""
    return f"{service}@{home}"


def site(home: Path, recorded: Mapping[str, Entry]) -> Site:
    """The ports and credentials of the recorded services."""
    return Site(home=home, ports={name: entry.ports for name, entry in recorded.items()}, credentials=credentials(home))
