import json
import re

import numpy as np
import pyarrow as pa
import pytest

from models.tokenizer import card
from models.tokenizer.quality import codebook_report
from models.tokenizer.residual import ResidualQuantizer
from models.tokenizer.vocabulary import Catalogue


@pytest.fixture(scope="module")
def report() -> dict:
    x = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    x[1] = x[0]
    quantizer = ResidualQuantizer.fit(x, levels=2, codes=8)
    sids = quantizer.assign(x, balanced=False)
    items = pa.table(
        {
            "item_id": [f"i{k}" for k in range(60)],
            "title": [f"<b>Item {k}</b>" for k in range(60)],
            "tags": [["pets", "cats"] if k % 2 else None for k in range(60)],
            "duration_ms": [0] * 60,
        }
    )
    catalogue = Catalogue.from_items(items, sids=sids, codes=8, popularity=np.arange(60))
    pairs = np.random.default_rng(1).integers(0, 60, (200, 2))
    return codebook_report(x, sids, quantizer.codebooks, catalogue=catalogue, pairs=pairs)


def test_the_report_is_json_and_complete(report: dict) -> None:
    assert json.loads(json.dumps(report)) == report
    assert (report["items"], report["levels"], report["codes"]) == (60, 2, 8)
    assert report["duplicate_embeddings"] == report["inseparable_items"] == 1
    assert sum(report["loads"][0]) == 60
    assert sum((index + 1) * count for index, count in enumerate(report["items_of_a_sid"])) == 60
    assert report["examples"][0]["items"] == max(report["loads"][0])
    assert report["examples"][0]["tags"][0][0] in ("pets", "cats")
    popular = [int(re.search(r"\d+", title).group()) for title in report["examples"][0]["titles"]]
    assert popular == sorted(popular, reverse=True)


def test_the_page_opens_without_a_network_and_escapes_titles(report: dict) -> None:
    page = card.html(report | {"text": "ngrams", "loss": 0.125}, title="Codebook <1>")
    assert "Codebook &lt;1&gt;" in page
    assert "&lt;b&gt;Item" in page
    assert "<b>Item" not in page
    assert "0.125" in page
    assert not re.search(r"<(script|link)[^>]+(src|href)=", page)
    for words in ("Items of each code", "Do neighbours share codes?", "What first-level codes hold", "perplexity"):
        assert words in page


def test_a_report_without_pairs_and_catalogue_still_draws(report: dict) -> None:
    bare = {key: value for key, value in report.items() if key not in ("neighbour_hit_rate", "examples")}
    page = card.html(bare)
    assert "Do neighbours" not in page
    assert "What first-level codes hold" not in page


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        codebook_report(np.zeros((3, 2)), np.zeros((2, 2), int), np.zeros((2, 4, 2)))


def test_drift_of_appended_items_is_shown(report: dict) -> None:
    drift = {"js": [0.4321, 0.1], "psi": [1.0, 0.1], "js_noise": [0.05, 0.05]}
    assert "0.4321" in card.html(report | {"usage_drift": drift})
    assert "Jensen-Shannon" not in card.html(report)
