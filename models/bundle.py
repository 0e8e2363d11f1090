"""The bundle: model, tokenizer, SID table and items as one immutable, verified unit in object storage.

``models/onerec/<version>/`` holds the files and ``manifest.json`` (sha256 and size of each), which is written
last: without it the bundle does not exist for any reader. The version names the data's time and the content's
digest; ``metrics.json`` is verified like the others but is not part of the digest, so equal content keeps its
name. ``models/onerec/aliases/<alias>.json`` is the one mutable object, moved by comparison. safetensors,
Parquet and JSON only: nothing in a bundle is ever executed. ``reward.safetensors`` is optional. What changes between
bundles is in ``models.deltas``.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from features.histories.windows import Limits
from features.storage import ObjectChanged, ObjectMissing, Storage, json_bytes
from models.architectures import config_of, restored, to_json
from models.decoding.trie import Trie
from models.generator import Generator
from models.rewards.reward import REWARD, RewardModel, load_reward, save_reward
from models.tokenizer.tokenizer import Tokenizer
from models.tokenizer.vocabulary import Catalogue

ROOT = "models/onerec"
MANIFEST = "manifest.json"
METRICS = "metrics.json"
REQUIRED = ("config.json", "model.safetensors", "tokenizer.safetensors", "sids.parquet", "items.parquet", METRICS)
SUFFIXES = (".json", ".safetensors", ".parquet")
UNPUBLISHED = "unpublished"
VERSION = r"\d{8}T\d{6}-[0-9a-f]{8}"
"""What ``version_name`` makes; nothing else becomes a path of the cache, which is emptied where it is damaged."""

log = logging.getLogger(__name__)


class BundleCorrupt(RuntimeError):
    """A bundle's file is missing, altered or unreadable; the message names it and says what to do."""


class AliasMoved(RuntimeError):
    """An alias points at another version, ``now``, than whoever wanted to move it knew of."""

    def __init__(self, alias: str, now: str | None) -> None:
        super().__init__(f"{alias} is {now or 'nothing'} now")
        self.now = now


def publish(
    storage: Storage,
    folder: Path,
    *,
    data_time: datetime,
    parents: Sequence[str] = (),
    lineage: Mapping[str, Any] | None = None,
) -> str:
    """Uploads ``folder`` as a new immutable bundle and returns its version.

    ``data_time`` is the (UTC) end of the data it was trained on, ``parents`` the versions it continues.
    Publishing the same content again changes nothing. Raises ValueError when a required file is missing.
    """
    manifest = seal(folder, data_time=data_time, parents=parents, lineage=lineage)
    version, prefix = str(manifest["version"]), f"{ROOT}/{manifest['version']}"
    if storage.exists(f"{prefix}/{MANIFEST}"):
        return version
    for name in manifest["files"]:
        storage.put(f"{prefix}/{name}", (folder / name).read_bytes())
    storage.put_json(f"{prefix}/{MANIFEST}", manifest)
    return version


def seal(
    folder: Path, *, data_time: datetime, parents: Sequence[str] = (), lineage: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The manifest that ``publish`` would write: what the folder holds, and the version that makes of it.

    Raises ValueError when a required file is missing.
    """
    files = _describe(folder)
    digest = content_digest(files)
    return {
        "version": version_name(data_time, digest),
        "data_time": data_time.astimezone(UTC).isoformat(),
        "published_at": datetime.now(UTC).isoformat(),
        "digest": digest,
        "files": files,
        "parents": list(parents),
        "lineage": dict(lineage or {}),
    }


def _describe(folder: Path) -> dict[str, dict[str, Any]]:
    """sha256 and size of every file of ``folder`` except a manifest."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; a bundle needs {', '.join(REQUIRED)}")
    foreign = [name for name in names if not name.endswith(SUFFIXES)]
    if foreign:
        raise ValueError(f"{folder} holds {', '.join(foreign)}; a bundle holds only {', '.join(SUFFIXES)} files")
    return {name: {"sha256": _sha256(folder / name), "size": (folder / name).stat().st_size} for name in names}


def content_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """sha256 over the names and hashes of a manifest's ``files``, without the metrics."""
    listed = [f"{name} {files[name]['sha256']}\n" for name in sorted(files) if name != METRICS]
    return hashlib.sha256("".join(listed).encode()).hexdigest()


def version_name(data_time: datetime, digest: str) -> str:
    """Such as ``20260101T000000-ab12cd34``: sorts by data time, unique by content."""
    if data_time.tzinfo is None:
        raise ValueError(f"data_time {data_time.isoformat()} has no time zone; give it in UTC")
    return f"{data_time.astimezone(UTC):%Y%m%dT%H%M%S}-{digest[:8]}"


def list_versions(storage: Storage) -> list[str]:
    """Versions of all complete bundles, oldest data first."""
    keys = (re.fullmatch(rf"{ROOT}/([^/]+)/{MANIFEST}", key) for key in storage.keys(f"{ROOT}/"))
    return sorted(key[1] for key in keys if key and key[1] != "aliases")


def read_manifest(storage: Storage, version: str) -> dict[str, Any]:
    """The bundle's manifest; raises ObjectMissing when the bundle is absent or half-published, or BundleCorrupt."""
    try:
        raw = storage.get(f"{ROOT}/{version}/{MANIFEST}")
    except ObjectMissing as error:
        raise _absent(storage, version) from error
    return _parse_manifest(raw, version)


def _absent(storage: Storage, version: str) -> ObjectMissing:
    known = list_versions(storage)
    return ObjectMissing(
        f"there is no complete bundle {version!r}; "
        f"the published ones are {', '.join(known[-5:]) or 'none'} (`onerec bundles list`)"
    )


def _parse_manifest(raw: bytes, version: str) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(raw)
        named, digest = manifest["version"], content_digest(manifest["files"])
        plain = all(re.fullmatch(r"[A-Za-z0-9_][\w.-]*", name) for name in manifest["files"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(version, MANIFEST, f"it cannot be read ({type(error).__name__}: {error})") from error
    if named != version or not version.endswith(digest[:8]) or not plain:
        raise _corrupt(version, MANIFEST, f"it describes {named!r} with content digest {digest[:8]}")
    return manifest


def fetch(storage: Storage, version: str, cache: Path) -> Path:
    """Downloads the bundle to ``cache/<version>``, every file verified, and returns that folder.

    The folder appears by an atomic rename, so it is whole or absent; one already there is verified again.
    Raises ObjectMissing (no such bundle), BundleCorrupt, StorageUnavailable.
    """
    if not re.fullmatch(VERSION, version):
        raise _absent(storage, version)
    target = cache / version
    if target.exists():
        try:
            verify(target, version)
            os.utime(target)  # servers forget the versions used longest ago
            return target
        except BundleCorrupt as error:
            log.warning("discarding the cached copy: %s", error)
            shutil.rmtree(target)
    manifest = read_manifest(storage, version)
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{version}.", suffix=".tmp", dir=cache))
    try:
        for name in manifest["files"]:
            try:
                (scratch / name).write_bytes(storage.get(f"{ROOT}/{version}/{name}"))
            except ObjectMissing as error:
                raise _corrupt(version, name, "the manifest names it, but it is not stored") from error
        (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        verify(scratch, version)
        try:
            scratch.rename(target)
        except OSError:  # another follower fetched the same version meanwhile: its copy is verified too
            if not target.exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def verify(folder: Path, version: str) -> dict[str, Any]:
    """Checks every file of a downloaded bundle against its manifest, which it returns; raises BundleCorrupt."""
    try:
        manifest = _parse_manifest((folder / MANIFEST).read_bytes(), version)
    except FileNotFoundError as error:
        raise _corrupt(version, MANIFEST, "it is missing") from error
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.exists():
            raise _corrupt(version, name, "the manifest names it, but it is missing")
        actual = _sha256(path)
        if actual != expected["sha256"]:
            size = f"{path.stat().st_size} bytes, expected {expected['size']}"
            raise _corrupt(version, name, f"sha256 is {actual}, expected {expected['sha256']} ({size})")
    return manifest


def _corrupt(version: str, name: str, what: str) -> BundleCorrupt:
    return BundleCorrupt(
        f"bundle {version}: {name} is corrupt: {what}; it will not be served: "
        f"publish the bundle again or move the alias to another version (`onerec promote`, `onerec rollback`)"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def set_alias(storage: Storage, alias: str, version: str) -> None:
    """Points ``alias`` at a complete bundle, wherever it points now; raises ObjectMissing for no such bundle."""
    storage.put(_alias_key(alias), _pointer(storage, version), "application/json")


def move_alias(storage: Storage, alias: str, version: str, *, only_from: Collection[str | None]) -> None:
    """``set_alias``, provided that ``alias`` points at one of ``only_from`` (None: at nothing) when it is written.

    Raises AliasMoved; an alias that points at ``version`` already is left as it is.
    """
    key, pointer = _alias_key(alias), _pointer(storage, version)
    known = storage.tagged(key)
    now = str(json.loads(known[0])["version"]) if known else None
    if now == version:
        return
    if now not in only_from:
        raise AliasMoved(alias, now)
    try:
        storage.swap(key, pointer, known[1] if known else None)
    except ObjectChanged as error:
        if (now := read_alias(storage, alias)) != version:
            raise AliasMoved(alias, now) from error


def _alias_key(alias: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", alias):
        raise ValueError(f"alias {alias!r} is not lower-case letters, digits and dashes, such as 'production'")
    return f"{ROOT}/aliases/{alias}.json"


def _pointer(storage: Storage, version: str) -> bytes:
    read_manifest(storage, version)
    return json_bytes({"version": version, "set_at": datetime.now(UTC).isoformat()})


def read_alias(storage: Storage, alias: str) -> str | None:
    """The version that ``alias`` points at, or None when it was never set."""
    try:
        return str(storage.get_json(f"{ROOT}/aliases/{alias}.json")["version"])
    except ObjectMissing:
        return None


def remove_alias(storage: Storage, alias: str, version: str) -> None:
    """Removes ``alias`` if it points at ``version``; who follows it keeps what it serves."""
    if read_alias(storage, alias) == version:
        storage.remove(f"{ROOT}/aliases/{alias}.json")


@dataclass(frozen=True, kw_only=True, eq=False)
class Bundle:
    """A bundle in memory, ready to recommend from."""

    version: str
    model: Generator
    tokenizer: Tokenizer
    catalogue: Catalogue
    trie: Trie
    limits: Limits
    metrics: dict[str, Any]
    reward: RewardModel | None = None
    """Judges items for this catalogue; absent from bundles of before there was one."""
    blocked: frozenset[str] = frozenset()
    """Items that are taken down: the model may name them, nobody may see them (models.deltas)."""

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "Bundle":
        """Reads a folder that ``fetch`` or ``save`` made; raises BundleCorrupt when its parts do not fit together.

        A folder without a manifest was not published yet and has the version "unpublished".
        """
        version = UNPUBLISHED
        if (folder / MANIFEST).exists():
            version = str(json.loads((folder / MANIFEST).read_text())["version"])
        try:
            return cls._read(folder, version, device)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise BundleCorrupt(
                f"bundle {version} in {folder} cannot be loaded ({type(error).__name__}: {error}); "
                "it was written by another version of the code or its parts do not belong together"
            ) from error

    @classmethod
    def _read(cls, folder: Path, version: str, device: str) -> "Bundle":
        config = json.loads((folder / "config.json").read_text())
        known = config_of(config["architecture"], config["model"])
        model = restored(known, load_file(folder / "model.safetensors"))
        catalogue = Catalogue.from_tables(
            pq.read_table(folder / "sids.parquet"), pq.read_table(folder / "items.parquet")
        )
        model.remember(torch.from_numpy(catalogue.sids.astype(np.int64)))
        if (catalogue.codes, catalogue.levels) != (model.config.codes, model.config.levels):
            raise ValueError(
                f"the SID table has {catalogue.levels} levels of {catalogue.codes} codes, "
                f"the model {model.config.levels} of {model.config.codes}"
            )
        reward = folder / REWARD
        return cls(
            version=version,
            model=model.to(device).eval().requires_grad_(False),
            tokenizer=Tokenizer.load(folder / "tokenizer.safetensors"),
            catalogue=catalogue,
            trie=Trie.from_sids(catalogue.sids).to(device),
            limits=Limits(**config["limits"]),
            metrics=json.loads((folder / METRICS).read_text()),
            reward=load_reward(reward, catalogue, device) if reward.exists() else None,
        )


def save(
    folder: Path,
    *,
    model: Generator,
    tokenizer: Tokenizer,
    catalogue: Catalogue,
    limits: Limits,
    metrics: Mapping[str, Any],
    reward: RewardModel | None = None,
) -> Path:
    """Writes the parts as a bundle folder that ``publish`` and ``Bundle.load`` accept; returns ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**to_json(model), "limits": asdict(limits)}
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()},
        folder / "model.safetensors",
    )
    tokenizer.save(folder / "tokenizer.safetensors")
    sids, items = catalogue.to_tables()
    pq.write_table(sids, folder / "sids.parquet", compression="zstd")
    pq.write_table(items, folder / "items.parquet", compression="zstd")
    (folder / METRICS).write_text(json.dumps(dict(metrics), indent=1, sort_keys=True, default=str))
    if reward is not None:
        save_reward(folder / REWARD, reward)
    return folder
