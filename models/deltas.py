"""A bundle moved on by its deltas: new items with SIDs from its frozen codebooks, and items taken down.

``DeltaReader`` is the servers' side: what object storage lists for a version is applied to the bundle as it was
published, giving a new catalogue and trie beside the old ones (both are immutable and swapped by reference).
``catch_up`` is the writers' side: whatever the catalogue in storage knows and a version does not gets its SID there
(OneRec technical report, arXiv 2506.13695, 2.1.2, has codebooks frozen; how new items join is ours). Left out:
spreading an item's share of its SID's popularity before it was ever shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from features import catalog, deltas
from features.deltas import DeltaCorrupt
from features.storage import Storage
from models.bundle import ROOT, Bundle, fetch, read_alias
from models.decoding.trie import Trie
from models.tokenizer.tokenizer import Tokenizer
from models.tokenizer.vocabulary import Catalogue


@dataclass(frozen=True, kw_only=True, eq=False)
class Moved:
    """A bundle after its deltas."""

    bundle: Bundle
    keys: tuple[str, ...]
    """The deltas and take-downs it stands for."""
    appended: int
    blocked: int
    """How many items of the catalogue are taken down."""
    problems: tuple[str, ...]
    """Deltas that could not be applied, and why."""


class DeltaReader:
    """Reads deltas of any version, each object once; use from one thread."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._items: dict[str, tuple[pa.Table, np.ndarray]] = {}
        self._blocks: dict[str, dict[str, Any]] = {}

    def keys(self, version: str) -> tuple[str, ...]:
        """Names of everything that applies to ``version`` now: two listings."""
        return (*deltas.delta_keys(self._storage, version), *deltas.block_keys(self._storage))

    def apply(self, bundle: Bundle, keys: Sequence[str]) -> Moved:
        """``bundle`` (as published) after ``keys``; what cannot be applied is left out and told in ``problems``."""
        problems: list[str] = []
        catalogue, records = bundle.catalogue, []
        for key in keys:
            try:
                if key.startswith(f"{deltas.BLOCKS}/"):
                    records.append(self._block(key))
                else:
                    catalogue = _appended(catalogue, *self._delta(key))
            except ValueError as error:  # DeltaCorrupt, or SIDs of another codebook
                problems.append(str(error))
        self._items = {key: self._items[key] for key in keys if key in self._items}  # other versions' are not held
        blocked = frozenset(deltas.fold_blocks(records))
        grown = len(catalogue) > len(bundle.catalogue)
        trie = Trie.from_sids(catalogue.sids).to(bundle.trie.sids.device) if grown else bundle.trie
        model = bundle.model.remembering(torch.from_numpy(catalogue.sids.astype(np.int64))) if grown else bundle.model
        return Moved(
            bundle=replace(bundle, model=model, catalogue=catalogue, trie=trie, blocked=blocked),
            keys=tuple(keys),
            appended=len(catalogue) - len(bundle.catalogue),
            blocked=int((catalogue.rows(sorted(blocked)) >= 0).sum()) if blocked else 0,
            problems=tuple(problems),
        )

    def _delta(self, key: str) -> tuple[pa.Table, np.ndarray]:
        if key not in self._items:
            self._items[key] = deltas.read_delta(self._storage, key)
        return self._items[key]

    def _block(self, key: str) -> dict[str, Any]:
        if key not in self._blocks:
            self._blocks[key] = deltas.read_block(self._storage, key)
        return self._blocks[key]


def catch_up(storage: Storage, version: str, cache: Path) -> int:
    """Gives every catalogued item that ``version`` lacks a SID, as one more delta; returns how many.

    Raises ObjectMissing, BundleCorrupt (a broken bundle) or DeltaCorrupt (a broken earlier delta).
    """
    folder = fetch(storage, version, cache)
    known = Catalogue.from_tables(pq.read_table(folder / "sids.parquet"), pq.read_table(folder / "items.parquet"))
    for key in deltas.delta_keys(storage, version):
        known = _appended(known, *deltas.read_delta(storage, key))
    items = catalog.read_items(storage)
    new = items.filter(pa.array(known.rows(items.column("item_id").to_pylist()) < 0, pa.bool_()))
    if not new.num_rows:
        return 0
    grown = Tokenizer.load(folder / "tokenizer.safetensors").append(known, new)
    deltas.write_delta(storage, version, new, grown.sids[len(known) :])
    return new.num_rows


def catch_up_served(storage: Storage, cache: Path) -> dict[str, int]:
    """``catch_up`` for every version that an alias names; version -> items that were new to it."""
    names = [key.removeprefix(f"{ROOT}/aliases/").removesuffix(".json") for key in storage.keys(f"{ROOT}/aliases/")]
    versions = {version for name in names if (version := read_alias(storage, name)) is not None}
    return {version: catch_up(storage, version, cache) for version in sorted(versions)}


def _appended(catalogue: Catalogue, items: pa.Table, sids: np.ndarray) -> Catalogue:
    """``catalogue`` with those ``items`` it does not have yet; two deltas may name the same one."""
    unknown = catalogue.rows(items.column("item_id").to_pylist()) < 0
    if sids.shape[1] != catalogue.levels or (len(sids) and not 0 <= sids.min() <= sids.max() < catalogue.codes):
        raise DeltaCorrupt(
            f"a delta has {sids.shape[1]} levels and codes up to {sids.max(initial=0)}, the version {catalogue.levels} "
            f"levels of {catalogue.codes} codes; add its items again"
        )
    return catalogue.append(items.filter(pa.array(unknown, pa.bool_())), sids[unknown])
