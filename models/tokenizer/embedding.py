"""Item embeddings for the tokenizer: what an item is and who watches it, in one vector (V1, arXiv 2506.13695, 2.1.1).

``modalities`` turn what is known of an item into tokens, a ``qformer`` compresses them, ``alignment`` trains it on
item-to-item contrast and captions. An item unseen in fit has no collaborative token and is placed by its content. An
item of which nothing is known has the vector of the QFormer's null token: defined, and the same for all such items
(``bare`` counts them). Left out: an encoder for pixels and speech, which plugs in as precomputed vectors.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from threadpoolctl import threadpool_limits

from features.schema import ITEM, conform
from models.tokenizer.alignment import (
    AlignmentConfig,
    Course,
    Lesson,
    Report,
    align,
    shape_of,
    take,
    to_inputs,
    torch_threads,
)
from models.tokenizer.caption import captions
from models.tokenizer.contrast import Fold, content_pairs, make_folds
from models.tokenizer.detail import Detail
from models.tokenizer.modalities import Modality, Tokens, fit_modalities, restore_modalities
from models.tokenizer.modalities.images import PATH, VECTOR
from models.tokenizer.modalities.watched import Watched
from models.tokenizer.qformer import QFormer
from models.tokenizer.spread import Spread

_ROWS = 4096  # items encoded at a time
_MODEL = "qformer."
_MODALITY = "modality."
_SPREAD = "spread."
_DETAIL = "detail."


class ItemEmbedder:
    """Maps ITEM rows to unit vectors float32 [n, dim]; ``state_dict`` is its whole state, ready for safetensors."""

    def __init__(
        self,
        config: AlignmentConfig,
        modalities: Mapping[str, Modality],
        model: QFormer,
        spread: Spread,
        detail: Detail | None = None,
    ) -> None:
        self.config, self.modalities, self.model = config, dict(modalities), model.eval()
        self.spread, self.detail = spread, detail
        self._latest: tuple[pa.Table, np.ndarray] | None = None

    @classmethod
    def fit(
        cls,
        items: pa.Table,
        exposures: pa.Table,
        config: AlignmentConfig | None = None,
        *,
        keep: Path | None = None,
        report: Report | None = None,
    ) -> "ItemEmbedder":
        """Learns from the ITEM rows and the EXPOSURE rows of a period; equal inputs and seeds give equal vectors.

        ``keep`` is a folder for the checkpoint from which a killed fit goes on. Without any pair in the log, items of
        like content are contrasted. Raises ValueError when there are no items, or nothing is known of any.
        """
        config = config or AlignmentConfig()
        items = conform_items(items)
        if not items.num_rows:
            raise ValueError("got 0 items; expected at least one item to embed")
        log, folds = make_folds(items, exposures, config.folds, config.dim, config.seed)
        modalities = fit_modalities(config.modalities, config.text, items, log, config.seed)
        if not modalities:
            raise ValueError(
                f"none of the {items.num_rows} items has any of {', '.join(config.modalities)}: nothing tells them "
                "apart; give them titles, tags, authors or a log"
            )
        tokens = {name: modality.encode(items) for name, modality in modalities.items()}
        words, vocabulary = captions(items)
        course = Course(
            tokens=tokens,
            shape=shape_of(modalities, config),
            lessons=_lessons(items, folds, config, "collaborative" in modalities),
            captions=words,
            vocabulary=vocabulary,
        )
        model = align(course, config, keep, report)
        with threadpool_limits(limits=1):  # several threads add the same numbers in another order
            x = _vectors(model, tokens, config)
            spread = Spread.fit(x, config.spread)
            told = config.detail and "text" in modalities
            detail = Detail.fit(items, spread(x), config.detail, config.seed) if told else None
        return cls(config, modalities, model, spread, detail)

    def encode(self, items: pa.Table) -> np.ndarray:
        """Unit vectors float32 [n, dim]; items unseen in fit, or without engagement there, are placed by content."""
        items = conform_items(items)
        if self._latest is not None and self._latest[0].equals(items):
            return self._latest[1].copy()
        vectors = np.empty((items.num_rows, self.config.dim), np.float32)
        for start in range(0, items.num_rows, _ROWS):
            part = items.slice(start, _ROWS)
            with threadpool_limits(limits=1):
                x = self.spread(_vectors(self.model, self._tokens(part), self.config))
            vectors[start : start + _ROWS] = x if self.detail is None else self.detail(part, x)
        self._latest = items, vectors
        return vectors.copy()

    def bare(self, items: pa.Table) -> np.ndarray:
        """bool [n]: items of which no modality knows anything."""
        tokens = self._tokens(conform_items(items))
        return ~np.any([np.zeros(items.num_rows, bool), *(part.mask.any(1) for part in tokens.values())], axis=0)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Arrays by name, for safetensors."""
        arrays = {_MODEL + name: value.numpy() for name, value in self.model.state_dict().items()}
        for name, modality in self.modalities.items():
            arrays |= {f"{_MODALITY}{name}.{part}": array for part, array in modality.state().items()}
        if self.detail is not None:
            arrays |= {_DETAIL + name: array for name, array in self.detail.state().items()}
        return {**arrays, f"{_SPREAD}mean": self.spread.mean, f"{_SPREAD}matrix": self.spread.matrix}

    @classmethod
    def from_state(
        cls, arrays: Mapping[str, np.ndarray], config: AlignmentConfig, modalities: list[str]
    ) -> "ItemEmbedder":
        """The embedder that ``state_dict`` came from, ``modalities`` its ``modalities`` names; raises ValueError."""
        state = {name.removeprefix(_MODALITY): a for name, a in arrays.items() if name.startswith(_MODALITY)}
        restored = restore_modalities(modalities, config.text, state)
        model = QFormer(shape_of(restored, config))
        weights = {
            name.removeprefix(_MODEL): torch.from_numpy(np.array(array))
            for name, array in arrays.items()
            if name.startswith(_MODEL)
        }
        try:
            model.load_state_dict(weights)
            spread = Spread(arrays[f"{_SPREAD}mean"], arrays[f"{_SPREAD}matrix"])
            words = {name.removeprefix(_DETAIL): a for name, a in arrays.items() if name.startswith(_DETAIL)}
            detail = Detail.from_state(words) if words else None
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"the embedder's state does not fit its configuration: {error}") from error
        return cls(config, restored, model, spread, detail)

    def _tokens(self, items: pa.Table) -> dict[str, Tokens]:
        return {name: modality.encode(items) for name, modality in self.modalities.items()}


@torch.no_grad()
def _vectors(model: QFormer, tokens: Mapping[str, Tokens], config: AlignmentConfig) -> np.ndarray:
    """The QFormer's unit vectors float32 [n, dim]."""
    inputs = to_inputs(tokens)
    n = len(next(iter(tokens.values())).mask)
    with torch_threads(config.threads):
        parts = [model(take(inputs, rows))[1] for rows in torch.arange(n).split(_ROWS)]
        return np.asarray(torch.cat(parts).numpy())


def conform_items(items: pa.Table) -> pa.Table:
    """ITEM rows in the schema, with the optional image columns when they are there."""
    rows = conform(items, ITEM)
    for name in (VECTOR, PATH):
        if name in items.column_names:
            rows = rows.append_column(name, items.column(name))
    return rows


def _lessons(items: pa.Table, folds: list[Fold], config: AlignmentConfig, watched: bool) -> list[Lesson]:
    """One of every fold with pairs that a loss is switched on for; pairs of like content when no fold has any."""
    wanted = [kind for kind in ("u2i", "i2i") if getattr(config, kind)]
    taught = [fold for fold in folds if any(len(getattr(fold, kind)) for kind in wanted)]
    if not taught:
        alike = content_pairs(items)
        return [Lesson(pairs={"u2i": alike, "i2i": alike}, watched=None)]
    return [
        Lesson(
            pairs={"u2i": fold.u2i, "i2i": fold.i2i},
            watched=Watched.fit(items, fold.log).encode(items) if watched else None,
        )
        for fold in taught
    ]
