"""What a run trains on when nobody says: the newest stored exposures and the model in production.

Logs live in their own time, so "newest" is the end of what is stored, not the wall's clock. What was chosen is stored
under ``runs/<run_id>/window.json`` and holds for every retry of the run, whatever arrives meanwhile.
"""

import re
from collections.abc import Callable
from datetime import datetime, timedelta

from features.intake import exposures as exposure_store
from features.runs import Run
from features.snapshot import EmptyWindow, prepare
from features.storage import ObjectMissing, Storage, connect
from models.bundle import read_alias, read_manifest

CONTEXT = timedelta(days=21)
NEW = timedelta(days=1)
REFERENCE = timedelta(days=2)
VERSION = re.compile(r"\d{8}T\d{6}-[0-9a-f]+")
Choice = Callable[[Storage, dict[str, str]], dict[str, str]]


class NoBase(ValueError):
    """A run was to go on from a model that does not exist; the message says what to do."""


def prepare_all(run_id: str, *, start: str, end: str, against: str = "") -> tuple[dict[str, str], str]:
    """Freezes [start, end), by default all that is stored, as the run's data; returns (choice, digest).

    ``base`` in the choice is the version behind the alias ``against``, empty when that was never set.
    """
    storage = connect()
    chosen = _once(storage, run_id, {"start": start, "end": end, "base": against}, _everything)
    return chosen, prepare(run_id, chosen["start"], chosen["end"], chosen["start"])


def prepare_newest(run_id: str, given: dict[str, str], *, base: str, targets: str) -> tuple[dict[str, str], str]:
    """Fills what is empty of start, reference_start, current_start and end; freezes; returns (choice, digest).

    ``base`` in the choice is a version or empty: an alias is followed once. ``targets`` is "new", trained on from
    reference_start, or "all". Raises EmptyWindow, NoBase.
    """
    if targets not in ("new", "all"):
        raise ValueError(f"targets {targets!r} are unknown; give 'new' or 'all'")
    storage = connect()
    chosen = _once(storage, run_id, {**given, "base": base}, _newest)
    return chosen, prepare(
        run_id, chosen["start"], chosen["end"], chosen["reference_start" if targets == "new" else "start"]
    )


def stored_hours(storage: Storage) -> tuple[datetime, datetime]:
    """``exposure_store.stored_hours``; raises EmptyWindow when nothing is stored."""
    found = exposure_store.stored_hours(storage)
    if found is None:
        raise EmptyWindow("no exposures are stored; ingest a log first: `onerec ingest PATH`")
    return found


def _once(storage: Storage, run_id: str, given: dict[str, str], choose: Choice) -> dict[str, str]:
    """``given`` with its gaps filled by ``choose``; a retried run gets what its first try was given."""
    key = f"{Run(storage, run_id).prefix('window')}.json"
    if all(value for name, value in given.items() if name != "base") and not _is_alias(given.get("base", "")):
        return given
    try:
        kept: dict[str, dict[str, str]] = storage.get_json(key)
        if kept["given"] == given:
            return kept["chosen"]
    except ObjectMissing:
        pass
    chosen = choose(storage, given)
    storage.put_json(key, {"given": given, "chosen": chosen})
    print(f"window of run {run_id}: {chosen}")
    return chosen


def _everything(storage: Storage, given: dict[str, str]) -> dict[str, str]:
    first, last = (given["start"], given["end"])
    if not (first and last):
        stored = stored_hours(storage)
        first, last = first or stored[0].isoformat(), last or stored[1].isoformat()
    unset = _is_alias(given["base"]) and read_alias(storage, given["base"]) is None
    base = "" if unset else _follow(storage, given["base"])
    return {"start": first, "end": last, "base": base}


def _newest(storage: Storage, given: dict[str, str]) -> dict[str, str]:
    end = datetime.fromisoformat(given["end"]) if given["end"] else stored_hours(storage)[1]
    current = datetime.fromisoformat(given["current_start"]) if given["current_start"] else end - NEW
    return {
        "start": given["start"] or (end - CONTEXT).isoformat(),
        "reference_start": given["reference_start"] or (current - REFERENCE).isoformat(),
        "current_start": current.isoformat(),
        "end": end.isoformat(),
        "base": _follow(storage, given["base"]),
    }


def _is_alias(base: str) -> bool:
    return bool(base) and not VERSION.fullmatch(base)


def _follow(storage: Storage, base: str) -> str:
    """The version behind ``base``."""
    if not _is_alias(base):
        return base
    version = read_alias(storage, base)
    if version is None:
        raise NoBase(f"alias {base!r} points at nothing; run the training pipeline first, or give base=VERSION")
    try:
        read_manifest(storage, version)
    except ObjectMissing as error:
        raise NoBase(f"alias {base!r} points at {version}: {error.args[0]}; `onerec promote` moves it") from error
    return version
