from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from features.schema import ITEM, conform
from models.tokenizer.cooccurrence import Collaborative
from models.tokenizer.modalities import NAMES, Tokens, fit_modalities, restore_modalities
from models.tokenizer.modalities.categories import AUTHOR, TAGS
from models.tokenizer.modalities.images import PATH, VECTOR, ImageVectors, Pictures
from models.tokenizer.modalities.numbers import Numbers
from models.tokenizer.modalities.text import HashedText, SentenceText, installed
from models.tokenizer.modalities.watched import Watched


def items(**columns: list) -> pa.Table:
    n = len(next(iter(columns.values())))
    extra = {name: columns.pop(name) for name in (VECTOR, PATH) if name in columns}
    table = conform(pa.table({"item_id": [f"i{k}" for k in range(n)], "duration_ms": [1000] * n, **columns}), ITEM)
    for name, values in extra.items():
        table = table.append_column(name, pa.array(values))
    return table


TITLES = ["red running shoes", "blue running shoes", "red shoes for running", "vegan chocolate cake", "chocolate cakes"]


def cosine(x: np.ndarray) -> np.ndarray:
    return x @ x.T


@pytest.mark.parametrize("kind", ["ngrams", "sentence"])
def test_like_titles_get_like_vectors_and_none_is_masked(kind: str) -> None:
    if kind == "sentence" and not installed():
        pytest.skip("the optional extra `text` is not installed")
    table = items(title=[*TITLES, None, ""])
    text = SentenceText() if kind == "sentence" else HashedText.fit(table, 4, seed=0)
    tokens = text.encode(table)
    alike = cosine(tokens.values[:5, 0])
    assert alike[3, 4] > alike[3, :3].max()
    assert min(alike[0, 1], alike[0, 2]) > alike[0, 3:5].max()
    assert tokens.mask[:, 0].tolist() == [True] * 5 + [False] * 2
    assert not tokens.values[5:].any()


def test_text_of_unknown_words_is_masked() -> None:
    text = HashedText.fit(items(title=TITLES), 4, seed=0)
    assert not text.encode(items(title=["zzz"])).mask.any()


def test_a_missing_sentence_encoder_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.tokenizer.modalities.text.installed", lambda: False)
    with pytest.raises(ValueError, match="optional extra `text`"):
        SentenceText()


def test_names_are_buckets_and_padding_is_masked() -> None:
    table = items(tags=[["a", "b"], ["b", "b", ""], None, [f"t{k}" for k in range(20)]], author_id=["x", "x", None, ""])
    tags, author = TAGS.encode(table), AUTHOR.encode(table)
    assert tags.mask.sum(1).tolist() == [2, 1, 0, TAGS.limit]
    assert tags.values[0, 1] == tags.values[1, 0] > 0
    assert author.mask[:, 0].tolist() == [True, True, False, False]
    assert author.values[0, 0] == author.values[1, 0]


def test_numbers_interpolate_and_are_clipped() -> None:
    table = items(duration_ms=[1000, 2000, 4000, 8000, 0], upload_time=[10**9, None, 2 * 10**9, 3 * 10**9, 4 * 10**9])
    numbers = Numbers.fit(table)
    tokens = numbers.encode(table)
    assert tokens.mask.tolist() == [[True, True], [True, False], [True, True], [True, True], [False, True]]
    assert np.allclose(tokens.values.sum(2), tokens.mask)
    beyond = numbers.encode(items(duration_ms=[10**9, 1], upload_time=[None, None]))
    assert np.allclose(beyond.values[:, 0], tokens.values[[3, 0], 0])


def test_a_number_that_never_varies_tells_nothing() -> None:
    assert not Numbers.fit(items(tags=[None, None])).encode(items(tags=[None, None])).mask.any()


def test_collaborative_vectors_are_found_by_item_and_masked_for_new_ones() -> None:
    table = items(tags=[None] * 4)
    vectors = np.array([[1, 0], [0, 0], [0, 1], [0.6, 0.8]], np.float32)
    watched = Watched.fit(table, Collaborative(vectors, np.array([5.0, 0, 95, 5])))
    tokens = watched.encode(table.take([3, 1, 2]))
    assert tokens.mask[:, 0].tolist() == [True, False, True]
    assert np.allclose(tokens.values[:, 0], [[0.3, 0.4, 0.5], [0, 0, 0], [0, 0.95, 0.95]])
    new = table.set_column(0, table.schema.field(0), pa.array(["a", "b", "c", "d"]))
    assert not watched.encode(new).mask.any()


def test_image_vectors_keep_their_directions() -> None:
    table = items(**{VECTOR: [[3.0, 4.0], None, [0.0, 5.0]]})
    image = ImageVectors.fit(table)
    tokens = image.encode(table)
    assert tokens.mask[:, 0].tolist() == [True, False, True]
    assert np.allclose(tokens.values[[0, 2], 0], [[0.6, 0.8], [0, 1]])
    with pytest.raises(ValueError, match="has 3 numbers"):
        image.encode(items(**{VECTOR: [[1.0, 2.0, 3.0]]}))
    with pytest.raises(ValueError, match="one width"):
        ImageVectors.fit(items(**{VECTOR: [[1.0], [1.0, 2.0]]}))


def test_pictures_of_like_colours_are_alike(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    names = []
    for name, colour in (("a", (250, 0, 0)), ("b", (230, 20, 10)), ("c", (0, 0, 250))):
        image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.png")
        names.append(str(tmp_path / f"{name}.png"))
    tokens = Pictures().encode(items(**{PATH: [*names, None]}))
    flat = tokens.values.reshape(4, -1)
    assert tokens.mask.all(1).tolist() == [True, True, True, False]
    assert np.linalg.norm(flat[0] - flat[1]) < 0.3 * np.linalg.norm(flat[0] - flat[2])
    (tmp_path / "broken.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        Pictures().encode(items(**{PATH: [str(tmp_path / "broken.png")]}))


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 items have NaN"):
        Tokens(np.array([[[1.0]], [[np.nan]]], np.float32), np.ones((2, 1), bool))
    image = ImageVectors(np.array([1.0]), np.array([1]))
    with pytest.raises(ValueError, match="NaN"):
        image.encode(items(**{VECTOR: [[float("nan")]]}))


def test_modalities_that_no_item_has_are_left_out_and_state_is_complete() -> None:
    table = items(title=TITLES, tags=[["a"]] * 5)
    nothing = Collaborative(np.zeros((5, 4), np.float32), np.zeros(5))
    fitted = fit_modalities(NAMES, "ngrams", table, nothing, seed=0)
    assert list(fitted) == ["text", "tags"]
    arrays = {f"{name}.{part}": array for name, m in fitted.items() for part, array in m.state().items()}
    restored = restore_modalities(list(fitted), "ngrams", arrays)
    for name, modality in fitted.items():
        assert (restored[name].encode(table).values == modality.encode(table).values).all()
    with pytest.raises(ValueError, match="modality 'text'"):
        restore_modalities(["text"], "ngrams", {})
