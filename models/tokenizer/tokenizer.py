"""The tokenizer: items in, semantic IDs out (OneRec technical report, arXiv 2506.13695, 2.1).

Embeds items (``embedding``), quantises them (``residual``) and makes the ``Catalogue`` the model reads.
Codebooks are frozen after ``fit``: new items are appended with the SIDs those codebooks give them, and
existing SIDs never change. Left out: the trained QFormer, and re-fitting on a moving catalogue (a new
bundle does that).
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

from features.schema import ITEM, conform
from models.tokenizer.embedding import ItemEmbedder
from models.tokenizer.interactions import popularity
from models.tokenizer.kmeans import mse
from models.tokenizer.quality import code_usage, neighbour_hit_rate, neighbour_pairs
from models.tokenizer.residual import ResidualQuantizer
from models.tokenizer.vocabulary import Catalogue

_FORMAT = "onerec-tokenizer-1"
_HEADER = "tokenizer"


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Shape of the SIDs; the papers use 3 x 8192, public data usually 256, a few thousand items 64."""

    levels: int = 3
    codes: int = 64
    dim: int = 64
    balanced: bool = True
    unique: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.levels < 1 or self.codes < 2 or self.dim < 4:
            raise ValueError(f"got {self}; expected at least 1 level, 2 codes and 4 dimensions")


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
    def fit(cls, items: pa.Table, exposures: pa.Table, config: TokenizerConfig | None = None) -> "Tokenizer":
        """Learns embeddings and codebooks from ITEM and EXPOSURE rows; equal inputs and seeds give equal codebooks.

        Raises ValueError when there are fewer items than codes or nothing tells the items apart.
        """
        config = config or TokenizerConfig()
        items = conform(items, ITEM)
        embedder = ItemEmbedder.fit(items, exposures, config.dim, config.seed)
        quantizer = ResidualQuantizer.fit(
            embedder.encode(items),
            levels=config.levels,
            codes=config.codes,
            balanced=config.balanced,
            seed=config.seed,
        )
        return cls(config, embedder, quantizer)

    def catalogue(self, items: pa.Table, exposures: pa.Table) -> Catalogue:
        """The catalogue of ``items`` with SIDs assigned together, and popularity from ``exposures``."""
        items = conform(items, ITEM)
        sids = self.quantizer.assign(
            self.embedder.encode(items), balanced=self.config.balanced, unique=self.config.unique
        )
        liked = popularity(exposures, items.column("item_id").to_pylist())
        return Catalogue.from_items(items, sids=sids, codes=self.config.codes, popularity=liked)

    def append(self, catalogue: Catalogue, new_items: pa.Table) -> Catalogue:
        """``catalogue`` with the ITEM rows it does not yet know; SIDs of existing items are untouched."""
        new_items = conform(new_items, ITEM)
        known = catalogue.rows(new_items.column("item_id").to_pylist()) >= 0
        new_items = new_items.filter(pc.invert(pa.array(known, pa.bool_())))
        if not new_items.num_rows:
            return catalogue
        x = self.embedder.encode(new_items)
        if self.config.unique:
            sids = self.quantizer.encode_beside(x, catalogue.sids)
        else:
            sids = self.quantizer.encode(x)
        return catalogue.append(new_items, sids)

    def quality(self, catalogue: Catalogue, items: pa.Table, exposures: pa.Table | None = None) -> dict[str, Any]:
        """Measures of the SIDs of ``items``; with exposures (best: later than the fit) also the neighbour hit rate."""
        items = conform(items, ITEM)
        x = self.embedder.encode(items)
        rows = catalogue.rows(items.column("item_id").to_pylist())
        if (rows < 0).any():
            raise ValueError(
                f"{int((rows < 0).sum())} of {len(rows)} items are not in the catalogue; append them first"
            )
        sids = catalogue.sids[rows]
        variance = float(((x - x.mean(0)) ** 2).sum(1).mean())
        errors = [
            mse(x, self.quantizer.reconstruct(sids[:, : level + 1]), np.arange(len(x)))
            for level in range(self.quantizer.levels)
        ]
        report: dict[str, Any] = {
            "items": len(x),
            "duplicate_embeddings": len(x) - len(np.unique(x, axis=0)),
            "mse": errors[-1],
            "mse_share_of_variance": [error / max(variance, 1e-12) for error in errors],
            **code_usage(sids, self.config.codes),
        }
        if exposures is not None:
            report["neighbour_hit_rate"] = neighbour_hit_rate(
                catalogue.sids, neighbour_pairs(exposures, catalogue.item_ids)
            )
        return report

    def save(self, path: Path) -> None:
        """Writes one safetensors file, arrays and a header of JSON; equal tokenizers give equal bytes.

        The header is one entry because safetensors writes several in an order of its own.
        """
        arrays = {f"embedder.{name}": array for name, array in self.embedder.state_dict().items()}
        arrays["codebooks"] = self.quantizer.codebooks
        header = json.dumps({"format": _FORMAT, "config": asdict(self.config)}, sort_keys=True)
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, {_HEADER: header})

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """The tokenizer that ``save`` wrote; raises ValueError when the file is something else."""
        with safe_open(path, framework="numpy") as stored:
            header: dict[str, Any] = json.loads((stored.metadata() or {}).get(_HEADER, "{}"))
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
        if header.get("format") != _FORMAT:
            raise ValueError(f"{path} has the format {header.get('format')!r}; expected {_FORMAT!r}")
        config = TokenizerConfig(**header["config"])
        embedder = ItemEmbedder.from_state(
            {name.removeprefix("embedder."): a for name, a in arrays.items() if name.startswith("embedder.")}
        )
        return cls(config, embedder, ResidualQuantizer(arrays["codebooks"]))
