"""Images of an item, when it has any: precomputed vectors of any frozen encoder, or pictures read from disk.

ITEM tables may carry one of two optional columns: ``image_vector`` (list<float>, e.g. of CLIP run elsewhere) or
``image_path`` (string). A picture becomes four tokens, its quadrants, each 8 x 8 RGB in the frequency domain (DCT-II,
the low frequencies): colours and coarse layout of a cover, without any weights. Left out: a vision network of our own.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pyarrow as pa
from scipy.fft import dctn

from models.tokenizer.modalities.tokens import Tokens

VECTOR, PATH = "image_vector", "image_path"
_SIDE, _KEPT, _QUADRANTS = 8, 4, 4


class ImageVectors:
    """One token: the vector in ``image_vector``, divided by the catalogue's typical length."""

    buckets = 0

    def __init__(self, scale: np.ndarray, width: np.ndarray) -> None:
        self.scale, self.width = scale, int(width[0])

    @classmethod
    def fit(cls, items: pa.Table) -> "ImageVectors":
        """Width and scale of the vectors there are; raises ValueError when they differ in width."""
        vectors = [np.asarray(v, np.float64) for v in items.column(VECTOR).to_pylist() if v]
        widths = {len(v) for v in vectors}
        if len(widths) != 1:
            raise ValueError(f"{VECTOR} has vectors of widths {sorted(widths)}; expected one width for all items")
        scale = max(float(np.mean([np.linalg.norm(v) for v in vectors])), 1e-9)
        return cls(np.array([scale], np.float32), np.array(sorted(widths), np.int64))

    def encode(self, items: pa.Table) -> Tokens:
        """Masked where there is no vector; raises ValueError for one of another width."""
        values = np.zeros((items.num_rows, 1, self.width), np.float32)
        mask = np.zeros((items.num_rows, 1), bool)
        given = items.column(VECTOR).to_pylist() if VECTOR in items.column_names else []
        for row, vector in enumerate(given):
            if not vector:
                continue
            if len(vector) != self.width:
                raise ValueError(f"{VECTOR} of row {row} has {len(vector)} numbers; the tokenizer knows {self.width}")
            values[row, 0], mask[row] = np.asarray(vector, np.float32) / self.scale, True
        return Tokens(values, mask)

    def state(self) -> dict[str, np.ndarray]:
        """``scale`` and ``width``."""
        return {"scale": self.scale, "width": np.array([self.width], np.int64)}


class Pictures:
    """Four tokens, the quadrants of the picture at ``image_path``."""

    buckets = 0
    width = 3 * _KEPT * _KEPT

    def __init__(self) -> None:
        if importlib.util.find_spec("PIL") is None:
            raise ValueError(
                f"the column {PATH!r} needs Pillow to read pictures: pip install pillow, or give {VECTOR!r}"
            )

    def encode(self, items: pa.Table) -> Tokens:
        """Masked where there is no path; raises ValueError for a picture that cannot be read."""
        values = np.zeros((items.num_rows, _QUADRANTS, self.width), np.float32)
        mask = np.zeros((items.num_rows, _QUADRANTS), bool)
        given = items.column(PATH).to_pylist() if PATH in items.column_names else []
        for row, path in enumerate(given):
            if path:
                values[row], mask[row] = _quadrants(Path(path)), True
        return Tokens(values, mask)

    def state(self) -> dict[str, np.ndarray]:
        """Nothing."""
        return {}


def _quadrants(path: Path) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB").resize((2 * _SIDE, 2 * _SIDE)), np.float64) / 127.5 - 1
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{PATH} {str(path)!r} cannot be read as a picture: {error}") from error
    corners = [(y, x) for y in (0, _SIDE) for x in (0, _SIDE)]
    blocks = np.stack([pixels[y : y + _SIDE, x : x + _SIDE] for y, x in corners])
    return dctn(blocks, axes=(1, 2), norm="ortho")[:, :_KEPT, :_KEPT].reshape(_QUADRANTS, -1) / _SIDE
