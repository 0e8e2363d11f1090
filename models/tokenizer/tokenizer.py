"""The tokenizer: items in, semantic IDs out (OneRec technical report, arXiv 2506.13695, 2.1).

Embeds items (``embedding``), quantises them (``residual``) and makes the ``Catalogue`` the model reads.
Codebooks are frozen after ``fit``: new items are appended with the SIDs those codebooks give them, and
existing SIDs never change. The file holds modalities, QFormer and codebooks, so whoever loads it can give a new
item its SID. Left out: re-fitting on a moving catalogue (a new bundle does that).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors import safe_open
from safetensors.numpy import save_file

from models.tokenizer.alignment import AlignmentConfig, Report
from models.tokenizer.embedding import ItemEmbedder, conform_items
from models.tokenizer.interactions import popularity
from models.tokenizer.quality import codebook_report, neighbour_pairs
from models.tokenizer.residual import ResidualQuantizer
from models.tokenizer.vocabulary import Catalogue

_FORMAT = "onerec-tokenizer-2"
_HEADER = "tokenizer"
_EMBEDDER = "embedder."


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(AlignmentConfig):
    """Shape of the SIDs beside the embedding's; the papers use 3 x 8192, public data usually 256, the demo 64."""

    levels: int = 3
    codes: int = 64
    balanced: bool = True
    slack: float = 0.05
    """How far above the even share a balanced cluster may grow."""
    unique: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels < 1 or self.codes < 2:
            raise ValueError(f"got {self.levels} levels of {self.codes} codes; expected at least 1 level and 2 codes")


class Tokenizer:
    """A fitted embedder with frozen codebooks."""

    def __init__(self, config: TokenizerConfig, embedder: ItemEmbedder, quantizer: ResidualQuantizer) -> None:
        self.config = config
        self.embedder = embedder
        self.quantizer = quantizer

    @property
    def codebooks(self) -> np.ndarray:
        """float32 [levels, codes, dim]."""
        return np.asarray(self.quantizer.codebooks, np.float32)

    @classmethod
    def fit(
        cls,
        items: pa.Table,
        exposures: pa.Table,
        config: TokenizerConfig | None = None,
        *,
        keep: Path | None = None,
        report: Report | None = None,
    ) -> "Tokenizer":
        """Learns embeddings and codebooks from ITEM and EXPOSURE rows; equal inputs and seeds give equal codebooks.

        ITEM tables may carry ``image_vector`` or ``image_path`` too. ``keep`` is a folder for the checkpoint from
        which a killed fit goes on; ``report`` is called with the losses. Raises ValueError when there are fewer items
        than codes or nothing tells the items apart.
        """
        config = config or TokenizerConfig()
        if items.num_rows < config.codes:
            raise ValueError(
                f"got {items.num_rows} items for {config.codes} codes a level; give more items or ask for fewer codes"
            )
        embedder = ItemEmbedder.fit(items, exposures, config, keep=keep, report=report)
        quantizer = ResidualQuantizer.fit(
            embedder.encode(items),
            levels=config.levels,
            codes=config.codes,
            balanced=config.balanced,
            slack=config.slack,
            seed=config.seed,
        )
        return cls(config, embedder, quantizer)

    def catalogue(self, items: pa.Table, exposures: pa.Table) -> Catalogue:
        """The catalogue of ``items`` with SIDs assigned together, and popularity from ``exposures``."""
        items = conform_items(items)
        sids = self.quantizer.assign(
            self.embedder.encode(items), balanced=self.config.balanced, unique=self.config.unique
        )
        liked = popularity(exposures, items.column("item_id").to_pylist())
        return Catalogue.from_items(
            items, sids=sids, codes=self.config.codes, popularity=liked, codebook=self.quantizer.version
        )

    def append(self, catalogue: Catalogue, new_items: pa.Table) -> Catalogue:
        """``catalogue`` with the ITEM rows it does not yet know; SIDs of existing items are untouched."""
        new_items = conform_items(new_items)
        known = catalogue.rows(new_items.column("item_id").to_pylist()) >= 0
        new_items = new_items.filter(pc.invert(pa.array(known, pa.bool_())))
        if not new_items.num_rows:
            return catalogue
        x = self.embedder.encode(new_items)
        if self.config.unique:
            sids = self.quantizer.encode_beside(x, catalogue.sids)
        else:
            sids = self.quantizer.encode(x)
        return catalogue.append(new_items, sids, codebook=self.quantizer.version)

    def quality(self, catalogue: Catalogue, items: pa.Table, exposures: pa.Table | None = None) -> dict[str, Any]:
        """Measures of the SIDs of ``items``; with exposures (best: later than the fit) also the neighbour hit rate.

        JSON-able, and what ``card.html`` draws. Raises ValueError for items that are not in the catalogue.
        """
        items = conform_items(items)
        rows = catalogue.rows(items.column("item_id").to_pylist())
        if (rows < 0).any():
            raise ValueError(
                f"{int((rows < 0).sum())} of {len(rows)} items are not in the catalogue; append them first"
            )
        sids = catalogue.sids[rows]
        shown = Catalogue.from_items(items, sids=sids, codes=catalogue.codes, popularity=catalogue.popularity[rows])
        pairs = neighbour_pairs(exposures, shown.item_ids) if exposures is not None else None
        return {
            "codebook": self.quantizer.version,
            "modalities": ", ".join(self.embedder.modalities),
            "items_without_modality": int(self.embedder.bare(items).sum()),
            **codebook_report(self.embedder.encode(items), sids, self.codebooks, catalogue=shown, pairs=pairs),
        }

    def save(self, path: Path) -> None:
        """Writes one safetensors file, arrays and a header of JSON; equal tokenizers give equal bytes.

        The header is one entry because safetensors writes several in an order of its own.
        """
        arrays = {_EMBEDDER + name: array for name, array in self.embedder.state_dict().items()}
        arrays["codebooks"] = self.quantizer.codebooks
        header = json.dumps(
            {"format": _FORMAT, "config": asdict(self.config), "modalities": list(self.embedder.modalities)},
            sort_keys=True,
        )
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, {_HEADER: header})

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """The tokenizer that ``save`` wrote; raises ValueError for another file or another version."""
        with safe_open(path, framework="numpy") as stored:
            header: dict[str, Any] = json.loads((stored.metadata() or {}).get(_HEADER, "{}"))
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
        if header.get("format") != _FORMAT:
            raise ValueError(
                f"{path} has the tokenizer format {header.get('format')!r}; this release reads {_FORMAT!r}: load it "
                f"with the release that wrote it, or train a new tokenizer"
            )
        config = TokenizerConfig(**header["config"])
        state = {name.removeprefix(_EMBEDDER): a for name, a in arrays.items() if name.startswith(_EMBEDDER)}
        embedder = ItemEmbedder.from_state(state, config, header["modalities"])
        return cls(config, embedder, ResidualQuantizer(arrays["codebooks"], config.slack))
