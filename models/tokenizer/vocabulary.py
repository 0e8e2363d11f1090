"""The catalogue: every item the model can name, its semantic ID (SID) and the attributes the model reads.

One row an item; row numbers are the model's item index and never change: new items are appended with SIDs
from the frozen codebooks (OneRec Technical Report, arXiv 2506.13695, 2.1.2; there is no published rule for
collisions, so here a SID may name several items, or ``disambiguated`` adds a level that numbers them). The catalogue
knows which codebooks its SIDs come from and refuses those of others. It is stored as two Parquet tables, ``sids``
and ``items``, that move and roll back with the model. Left out: take-downs, and the search trie over the
SIDs (``models.decoding``).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from features.schema import ITEM, conform

AUTHOR_BUCKETS = 2048
TAG_BUCKETS = 256


def stable_hash(name: str) -> int:
    """A 64-bit hash of ``name`` that is the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


@lru_cache(maxsize=1 << 16)
def bucket(name: str, buckets: int) -> int:
    """The stable hash bucket of ``name`` in 1..buckets-1; the empty name is bucket 0 (unknown)."""
    return 1 + stable_hash(name) % (buckets - 1) if name else 0


def titles_of(items: pa.Table) -> list[str]:
    """What to call each item: its title, else its tags joined, else its id."""
    names = (items.column("title"), pc.binary_join(items.column("tags"), " "))
    given = [pc.if_else(pc.equal(name, ""), None, name) for name in names]
    return _strings(pc.coalesce(*given, items.column("item_id")))


def _strings(column: pa.ChunkedArray) -> list[str]:
    found: list[str] = column.to_numpy().tolist()  # holds the interpreter a tenth as long as to_pylist
    return found


def disambiguated(sids: np.ndarray, codes: int, taken: np.ndarray | None = None) -> np.ndarray:
    """SIDs int32 [n, levels + 1]: one more level that numbers the items of each SID [n, levels], in row order.

    ``taken`` [m, levels + 1] are disambiguated SIDs of items that came before; their numbers are not given again.
    Raises ValueError when a SID names more items than there are ``codes``.
    """
    before = np.zeros((0, sids.shape[1] + 1), np.int32) if taken is None else taken
    everything = np.concatenate([before[:, :-1], sids])
    _, group = np.unique(everything, axis=0, return_inverse=True)
    group = group.reshape(-1)
    start = np.zeros(int(group.max(initial=-1)) + 1, np.int64)
    np.maximum.at(start, group[: len(before)], before[:, -1] + 1)
    own = group[len(before) :]
    order = np.argsort(own, kind="stable")
    first = np.searchsorted(own[order], own[order])
    number = np.empty(len(own), np.int64)
    number[order] = np.arange(len(own)) - first + start[own[order]]
    if len(number) and number.max() >= codes:
        raise ValueError(
            f"one SID names {number.max() + 1} items and a level has {codes} codes; use more codes or levels, or "
            "unique SIDs"
        )
    return np.concatenate([sids, number[:, None]], axis=1).astype(np.int32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Catalogue:
    """Items and their SIDs, row by row; ``codes`` is the codebook size, so every SID entry is in 0..codes-1.

    ``items`` keeps the ITEM rows for storage; built from the other fields when it is not given. ``codebook`` is the
    version of the codebooks that made the SIDs (``ResidualQuantizer.version``), empty when it is not known.
    """

    item_ids: list[str]
    sids: np.ndarray  # int32 [n, levels]
    codes: int
    author: np.ndarray  # int64 [n] in 0..AUTHOR_BUCKETS-1, 0 = unknown
    tag: np.ndarray  # int64 [n] in 0..TAG_BUCKETS-1, 0 = unknown; of the item's first tag
    duration_ms: np.ndarray  # float32 [n]
    popularity: np.ndarray  # float32 [n], see models.tokenizer.interactions.popularity
    titles: list[str]
    items: pa.Table | None = None
    codebook: str = ""

    def __post_init__(self) -> None:
        n = len(self.item_ids)
        if self.sids.ndim != 2 or self.sids.dtype != np.int32:
            raise ValueError(f"sids are {self.sids.dtype} of shape {self.sids.shape}; expected int32 [items, levels]")
        lengths = {name: len(getattr(self, name)) for name in ("sids", "author", "tag", "duration_ms", "popularity")}
        lengths["titles"] = len(self.titles)
        wrong = {name: length for name, length in lengths.items() if length != n}
        if wrong:
            raise ValueError(f"the catalogue has {n} item ids but {wrong}; every column needs one row an item")
        if n and (self.sids.min() < 0 or self.sids.max() >= self.codes):
            raise ValueError(f"SID entries span {self.sids.min()}..{self.sids.max()}; expected 0..{self.codes - 1}")
        if not self.index.is_unique:
            raise ValueError(f"{n - len(set(self.item_ids))} item ids are repeated; give each item one row")

    @classmethod
    def from_items(
        cls,
        items: pa.Table,
        *,
        sids: np.ndarray,
        codes: int,
        popularity: np.ndarray | None = None,
        codebook: str = "",
    ) -> "Catalogue":
        """The catalogue of ITEM rows with their SIDs [n, levels]; popularity defaults to 0."""
        items = conform(items, ITEM)
        author = _buckets(items.column("author_id"), AUTHOR_BUCKETS)
        tag = _buckets(pc.binary_join(pc.list_slice(items.column("tags"), 0, 1), ""), TAG_BUCKETS)
        if popularity is None:
            popularity = np.zeros(items.num_rows, np.float32)
        return cls._of(items, sids, codes, author, tag, popularity, codebook)

    @classmethod
    def _of(
        cls,
        items: pa.Table,
        sids: np.ndarray,
        codes: int,
        author: np.ndarray,
        tag: np.ndarray,
        popularity: np.ndarray,
        codebook: str,
    ) -> "Catalogue":
        return cls(
            item_ids=_strings(items.column("item_id")),
            sids=np.asarray(sids, np.int32),
            codes=codes,
            author=author,
            tag=tag,
            duration_ms=items.column("duration_ms").to_numpy().astype(np.float32),
            popularity=np.asarray(popularity, np.float32),
            titles=titles_of(items),
            items=items,
            codebook=codebook,
        )

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def levels(self) -> int:
        """How many codes a SID has."""
        return self.sids.shape[1]

    @cached_property
    def index(self) -> pd.Index:
        """Item ids in row order, for look-ups."""
        return pd.Index(self.item_ids, dtype=object)

    def rows(self, item_ids: Sequence[str] | np.ndarray) -> np.ndarray:
        """Row of each id, int32 [len(item_ids)]; -1 where the item is unknown."""
        return self.index.get_indexer(pd.Index(item_ids, dtype=object)).astype(np.int32)

    def items_of(self, sid: Sequence[int] | np.ndarray) -> list[str]:
        """Ids of the items that ``sid`` names, in row order; empty when it names none."""
        return [self.item_ids[row] for row in self._listing.get(tuple(int(code) for code in sid), ())]

    @cached_property
    def _listing(self) -> dict[tuple[int, ...], list[int]]:
        listing: dict[tuple[int, ...], list[int]] = {}
        for row, sid in enumerate(self.sids.tolist()):
            listing.setdefault(tuple(sid), []).append(row)
        return listing

    def append(
        self, items: pa.Table, sids: np.ndarray, popularity: np.ndarray | None = None, codebook: str = ""
    ) -> "Catalogue":
        """This catalogue followed by new items; existing rows keep their numbers and SIDs.

        Raises ValueError when an item is already here, or a SID has other levels or comes from another codebook.
        """
        if codebook and self.codebook and codebook != self.codebook:
            raise ValueError(
                f"the new SIDs come from codebook {codebook}, this catalogue's from {self.codebook}; encode the items "
                "with the tokenizer of this catalogue's bundle, or refit and map the old SIDs"
            )
        new = Catalogue.from_items(items, sids=sids, codes=self.codes, popularity=popularity)
        if len(new) and new.levels != self.levels:
            raise ValueError(f"the new SIDs have {new.levels} levels; this catalogue has {self.levels}")
        known = [item for item, row in zip(new.item_ids, self.rows(new.item_ids), strict=True) if row >= 0]
        if known:
            raise ValueError(
                f"{len(known)} items are already in the catalogue, first {known[0]!r}; append only new ones"
            )
        if not len(new):
            return self
        return Catalogue(
            item_ids=self.item_ids + new.item_ids,
            codes=self.codes,
            titles=self.titles + new.titles,
            items=pa.concat_tables([self._items(), new._items()]),
            codebook=self.codebook,
            **{
                name: np.concatenate([getattr(self, name), getattr(new, name)])
                for name in ("sids", "author", "tag", "duration_ms", "popularity")
            },
        )

    def with_popularity(self, popularity: np.ndarray) -> "Catalogue":
        """The same items and SIDs with fresher popularity [n]."""
        return replace(self, popularity=np.asarray(popularity, np.float32))

    def to_tables(self) -> tuple[pa.Table, pa.Table]:
        """(sids, items): item_id with its SID and the codebook size, and ITEM columns with buckets and popularity."""
        ids = pa.array(self.item_ids, pa.string())
        offsets = pa.array(np.arange(len(self) + 1, dtype=np.int32) * self.levels)
        sids = pa.table({"item_id": ids, "sid": pa.ListArray.from_arrays(offsets, pa.array(self.sids.reshape(-1)))})
        metadata = {"codes": str(self.codes), "levels": str(self.levels), "codebook": self.codebook}
        sids = sids.replace_schema_metadata(metadata)
        items = self._items()
        for name, values in (("author_bucket", self.author), ("tag_bucket", self.tag), ("popularity", self.popularity)):
            items = items.append_column(name, pa.array(values))
        return sids, items

    @classmethod
    def from_tables(cls, sids: pa.Table, items: pa.Table) -> "Catalogue":
        """The catalogue that ``to_tables`` wrote; raises ValueError when the two do not belong together."""
        metadata = sids.schema.metadata or {}
        if b"codes" not in metadata or b"levels" not in metadata:
            raise ValueError("the SID table says neither its codebook size nor its levels; write it with to_tables()")
        if not sids.column("item_id").equals(items.column("item_id")):
            raise ValueError(
                f"{sids.num_rows} SIDs and {items.num_rows} items differ in their ids; use one bundle's tables"
            )
        levels, codes = int(metadata[b"levels"]), int(metadata[b"codes"])
        flat = sids.column("sid").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        # The stored buckets are what the model was trained with; they win over today's hash.
        author, tag = (items.column(name).to_numpy().astype(np.int64) for name in ("author_bucket", "tag_bucket"))
        popularity, codebook = items.column("popularity").to_numpy(), metadata.get(b"codebook", b"").decode()
        return cls._of(conform(items, ITEM), flat.reshape(-1, levels), codes, author, tag, popularity, codebook)

    def _items(self) -> pa.Table:
        if self.items is not None:
            return self.items
        columns = {"item_id": self.item_ids, "title": self.titles, "duration_ms": self.duration_ms.astype(np.int64)}
        return conform(pa.table(columns), ITEM)


def _buckets(names: pa.ChunkedArray, buckets: int) -> np.ndarray:
    coded = pc.fill_null(names, "").combine_chunks().dictionary_encode()
    known = [bucket(name, buckets) for name in coded.dictionary.to_pylist()]
    return np.array(known, np.int64)[coded.indices.to_numpy()]
