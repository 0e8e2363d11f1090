"""Lists from a session model, in process and from the real server."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from features.histories.context import Context, Pathway, cold_context
from features.histories.windows import Limits
from features.storage import Storage
from models.bundle import Bundle, publish, save, set_alias
from models.onerec_session import OneRecSession, SessionConfig
from models.pathways import to_tensors
from models.serving.recommender import Recommender
from models.tokenizer.tokenizer import Tokenizer
from models.tokenizer.vocabulary import Catalogue

ITEMS = 4


@pytest.fixture(scope="module")
def folder(tiny_tokenizer: tuple[Tokenizer, Catalogue], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a session model with random weights."""
    tokenizer, catalogue = tiny_tokenizer
    torch.manual_seed(0)
    config = SessionConfig(
        codes=8, d_model=16, heads=2, kv_groups=1, embed=8, items=ITEMS, encoder_layers=1, decoder_layers=1, ffn=16
    )
    limits = Limits(short=5, positive=6, lifelong=7)
    place = tmp_path_factory.mktemp("session")
    model = OneRecSession(config)
    return save(place, model=model, tokenizer=tokenizer, catalogue=catalogue, limits=limits, metrics={})


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return Bundle.load(folder)


def context_of(bundle: Bundle, requests: int) -> Context:
    """Users who saw five items each, of a cold past otherwise."""
    cold = cold_context(requests, bundle.limits)
    rng = np.random.default_rng(0)
    item = rng.integers(0, len(bundle.catalogue), (requests, bundle.limits.short)).astype(np.int32)
    seconds = rng.random(item.shape).astype(np.float32) * 1e4
    labels = np.zeros(item.shape, np.int32)
    return replace(
        cold, short=Pathway(item=item, age_s=seconds, play_ms=seconds, duration_ms=2 * seconds, labels=labels)
    )


def test_a_list_has_distinct_items_unseen_and_in_the_models_order(bundle: Bundle) -> None:
    context = context_of(bundle, 5)
    ids = bundle.catalogue.item_ids
    exclude = [set(ids[:60]), set(), set(ids[:-2]), set(ids), set()]
    answers = Recommender(bundle).recommend(context, num_items=10, beam_width=8, mode="session", exclude=exclude)
    for row, answer in enumerate(answers):
        assert len(set(answer.item_ids)) == len(answer) <= ITEMS
        assert not set(answer.item_ids) & (exclude[row] | {ids[i] for i in context.short.item[row]})
        assert np.array_equal(bundle.catalogue.sids[bundle.catalogue.rows(answer.item_ids)], answer.sids)
    assert [len(answers[row]) for row in (0, 1, 3, 4)] == [ITEMS, ITEMS, 0, ITEMS]
    assert len(answers[2]) <= 2
    sids = torch.from_numpy(np.stack([answers[row].sids for row in (1, 4)])).long()
    asked = to_tensors(context, bundle.catalogue)
    with torch.no_grad():
        kv = bundle.model.encode(asked)
        logits = bundle.model.score(kv, torch.zeros(5, ITEMS, 3).long().index_copy(0, torch.tensor([1, 4]), sids))
    again = logits[[1, 4]].log_softmax(-1).gather(-1, sids.unsqueeze(-1)).squeeze(-1)
    served = np.stack([answers[row].log_probs for row in (1, 4)])
    np.testing.assert_allclose(served, again, atol=1e-4)


def test_a_short_page_is_the_beginning_of_the_list(bundle: Bundle) -> None:
    context = context_of(bundle, 2)
    recommender = Recommender(bundle)
    whole, page = (recommender.recommend(context, num_items=n, beam_width=8, mode="session") for n in (10, 2))
    assert [answer.item_ids[:2] for answer in whole] == [answer.item_ids for answer in page]


def test_the_first_item_of_a_list_can_be_ranked_as_single_items_are(bundle: Bundle) -> None:
    (answer,) = Recommender(bundle).recommend(context_of(bundle, 1), num_items=20, beam_width=64)
    assert len(answer) == 20
    assert (np.diff(answer.scores) <= 0).all()


def test_a_model_of_single_items_writes_no_lists(write_bundle: Callable[..., Path], tmp_path: Path) -> None:
    single = Recommender(Bundle.load(write_bundle(tmp_path)))
    with pytest.raises(ValueError, match="holds a model of single items; use mode 'beam'"):
        single.recommend(cold_context(1, single.bundle.limits), num_items=3, beam_width=8, mode="session")


def test_the_server_serves_lists_and_explains_when_it_cannot(
    start_model_server: Any,
    new_bucket: Callable[[], Storage],
    folder: Path,
    write_bundle: Callable[..., Path],
    keys: dict[str, str],
    tmp_path: Path,
) -> None:
    storage, time = new_bucket(), datetime(2026, 1, 2, tzinfo=UTC)
    versions = {
        "lists": publish(storage, folder, data_time=time),
        "singles": publish(storage, write_bundle(tmp_path / "single"), data_time=time),
    }
    for alias, version in versions.items():
        set_alias(storage, alias, version)
    with start_model_server(tmp_path, storage, keys, "onerec=lists", "onerec-frozen=singles") as server:
        server.serving(versions["lists"])
        server.serving(versions["singles"], "onerec-frozen")
        answer = server.infer(["a", "b"], mode="session")
        assert answer.status_code == 200, answer.text
        shapes = {each["name"]: each["shape"] for each in answer.json()["outputs"]}
        assert shapes["item_ids"] == [2, ITEMS]
        assert shapes["log_probs"] == [2, ITEMS, 3]
        refused = server.infer(["a"], "onerec-frozen", mode="session")
        assert refused.status_code == 400
        assert "holds a model of single items" in refused.json()["error"]
