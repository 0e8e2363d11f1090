"""The modalities of an item: which there are, how they are fitted together and kept in the tokenizer's file."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from models.tokenizer.cooccurrence import Collaborative
from models.tokenizer.modalities.categories import AUTHOR, MUSIC, TAGS
from models.tokenizer.modalities.images import PATH, VECTOR, ImageVectors, Pictures
from models.tokenizer.modalities.numbers import Numbers
from models.tokenizer.modalities.text import HashedText, SentenceText
from models.tokenizer.modalities.tokens import Modality, Tokens
from models.tokenizer.modalities.watched import Watched

NAMES = ("text", "tags", "author", "music", "numbers", "image", "collaborative")
"""All modalities, in the order in which their tokens stand."""

_TEXT_WIDTH = 64

__all__ = ["NAMES", "Modality", "Tokens", "fit_modalities", "restore_modalities"]


def fit_modalities(
    names: Sequence[str], text: str, items: pa.Table, log: Collaborative, seed: int
) -> dict[str, Modality]:
    """The modalities of ``names``, in order; one that no item has (images, say) is left out."""
    found: dict[str, Modality | None] = {
        "text": _text(text, items, seed) if "text" in names else None,
        "tags": TAGS,
        "author": AUTHOR,
        "music": MUSIC,
        "numbers": Numbers.fit(items),
        "image": _images(items) if "image" in names else None,
        "collaborative": Watched.fit(items, log),
    }
    kept = {name: modality for name, modality in found.items() if name in names and modality is not None}
    return {name: modality for name, modality in kept.items() if modality.encode(items).mask.any()}


def restore_modalities(names: Sequence[str], text: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Modality]:
    """The modalities whose ``state`` arrays are ``arrays``, named ``modality.array``; raises ValueError."""
    restored: dict[str, Modality] = {}
    for name in names:
        state = {key.split(".", 1)[1]: array for key, array in arrays.items() if key.split(".", 1)[0] == name}
        try:
            restored[name] = _restored(name, text, state)
        except TypeError as error:
            raise ValueError(f"the state of modality {name!r} holds {sorted(state)}: {error}") from error
    return restored


def _restored(name: str, text: str, state: dict[str, np.ndarray]) -> Modality:
    if name == "text":
        return SentenceText(**state) if text == "sentence" else HashedText(**state)
    if name == "image":
        return ImageVectors(**state) if state else Pictures()
    if name == "numbers":
        return Numbers(**state)
    if name == "collaborative":
        return Watched(**state)
    return {"tags": TAGS, "author": AUTHOR, "music": MUSIC}[name]


def _text(kind: str, items: pa.Table, seed: int) -> Modality:
    return SentenceText() if kind == "sentence" else HashedText.fit(items, _TEXT_WIDTH, seed)


def _images(items: pa.Table) -> Modality | None:
    for column, make in ((VECTOR, ImageVectors.fit), (PATH, lambda _: Pictures())):
        if column in items.column_names and items.column(column).null_count < items.num_rows:
            modality: Modality = make(items)
            return modality
    return None
