"""What a published version is, as flat facts to compare: recipe, data, tokenizer, metrics, catalogue, lineage.

Read from the bundle's manifest, config and metrics and from the run that made it, as far as that is still stored.
Parameters are compared by the content hash of each file: equal hashes are equal files.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from features.deltas import delta_keys
from features.runs import Run
from features.storage import ObjectMissing, Storage
from models.bundle import ROOT, read_alias, read_manifest

ALIAS = re.compile(r"[a-z][a-z0-9-]*")
TRAININGS = ("tokenizer", "pretrain", "reward", "align")
SECTIONS = ("lineage", "data", "recipe", "model", "files", "catalogue", "metrics")
"""In the order in which a person asks."""

Facts = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One fact that two versions do not share; None where a version does not have it."""

    section: str
    name: str
    old: Any
    new: Any

    @property
    def relative(self) -> float | None:
        """new / old - 1, of numbers."""
        if not isinstance(self.old, int | float) or not isinstance(self.new, int | float) or not self.old:
            return None
        return float(self.new / self.old - 1)


def facts(storage: Storage, version: str) -> Facts:
    """Everything known of ``version`` by section; raises ObjectMissing naming the versions there are."""
    manifest = read_manifest(storage, version)
    lineage = manifest["lineage"]
    config = _stored(storage, f"{ROOT}/{version}/config.json")
    metrics = _stored(storage, f"{ROOT}/{version}/metrics.json")
    window = lineage.get("window") or {}
    return {
        "lineage": {
            "parents": ", ".join(manifest["parents"]),
            "run": lineage.get("run_id", ""),
            "code": lineage.get("code", ""),
            "published_at": manifest["published_at"],
        },
        "data": {**_flat(window), "until": manifest["data_time"], "digest": lineage.get("data", "")},
        "recipe": _recipe(storage, str(lineage.get("run_id", ""))),
        "model": _flat({key: value for key, value in config.items() if key != "limits"}),
        "files": {name: about["sha256"][:12] for name, about in manifest["files"].items() if name != "metrics.json"},
        "catalogue": {
            "items": _rows(storage, f"{ROOT}/{version}/items.parquet"),
            "deltas": len(delta_keys(storage, version)),
        },
        "metrics": {name: value for name, value in (metrics.get("candidate") or {}).items() if value is not None},
    }


def differences(old: Facts, new: Facts) -> list[Change]:
    """Every fact in which the two differ, by section and name."""
    changes = []
    for section in SECTIONS:
        left, right = old.get(section, {}), new.get(section, {})
        for name in dict.fromkeys([*left, *right]):
            if left.get(name) != right.get(name):
                changes.append(Change(section=section, name=name, old=left.get(name), new=right.get(name)))
    return changes


def resolve(storage: Storage, name: str) -> str:
    """The version that ``name`` is: itself, or what the alias of that name points at; raises ObjectMissing."""
    if not name[:1].isdigit():
        found = read_alias(storage, name) if ALIAS.fullmatch(name) else None
        if found is None:
            raise ObjectMissing(f"there is no alias {name!r}; give a version or an alias of `onerec bundles list`")
        return found
    return str(read_manifest(storage, name)["version"])


def _recipe(storage: Storage, run_id: str) -> dict[str, Any]:
    """The settings of every training stage of the run; nothing when it is no longer stored."""
    found: dict[str, Any] = {}
    for stage in TRAININGS:
        record = Run(storage, run_id).done(stage) if run_id else None
        inputs = (record or {}).get("inputs", {})
        given = {key: inputs[key] for key in ("preset", "dropout") if key in inputs}
        given |= inputs.get("config") or inputs.get("recipe") or {}
        found |= {f"{stage}.{name}": value for name, value in _flat(given).items()}
    return found


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one level, names joined by dots."""
    found: dict[str, Any] = {}
    for name, each in value.items():
        found |= _flat(each, f"{prefix}{name}.") if isinstance(each, Mapping) else {f"{prefix}{name}": each}
    return found


def _rows(storage: Storage, key: str) -> int:
    return int(storage.get_table(key, ["item_id"]).num_rows)


def _stored(storage: Storage, key: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = storage.get_json(key)
    except ObjectMissing:
        return {}
    return found
