import numpy as np
import pytest
import torch

from features.histories.context import Context, Pathway, cold_context
from models.bundle import Bundle
from models.pathways import to_tensors
from models.serving.recommender import Recommender


@pytest.fixture(scope="module")
def bundle(write_bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.load(write_bundle(tmp_path_factory.mktemp("bundle")))


def random_context(bundle: Bundle, batch: int, seed: int = 0) -> Context:
    rng = np.random.default_rng(seed)

    def pathway(length: int) -> Pathway:
        item = rng.integers(0, len(bundle.catalogue), (batch, length)).astype(np.int32)
        item[:, : length // 2] = -1
        seconds = rng.random((batch, length)).astype(np.float32) * 1e4
        labels = rng.integers(0, 512, (batch, length)).astype(np.int32)
        return Pathway(item=item, age_s=seconds, play_ms=seconds, duration_ms=2 * seconds, labels=labels)

    limits = bundle.limits
    return Context(
        static=rng.integers(0, 1024, (batch, 8)),
        short=pathway(limits.short),
        positive=pathway(limits.positive),
        lifelong=pathway(limits.lifelong),
    )


@pytest.mark.parametrize("mode", ["beam", "sample"])
def test_items_exist_match_their_sid_and_come_once(bundle: Bundle, mode: str) -> None:
    answers = Recommender(bundle).recommend(random_context(bundle, 40), num_items=15, beam_width=32, mode=mode, seed=3)
    assert len(answers) == 40
    for answer in answers:
        assert len(answer) == len(set(answer.item_ids)) == 15
        rows = bundle.catalogue.rows(answer.item_ids)
        assert np.array_equal(bundle.catalogue.sids[rows], answer.sids)
        if mode == "beam":
            assert (np.diff(answer.scores) <= 0).all()


def test_a_wide_beam_ranks_like_scoring_every_item(bundle: Bundle) -> None:
    context = random_context(bundle, 3)
    (best, *_) = Recommender(bundle).recommend(context, num_items=100, beam_width=512, exclude_seen=False)
    sids = torch.tensor(bundle.catalogue.sids).long()
    with torch.inference_mode():
        logits = bundle.model(to_tensors(context.take(slice(0, 1)), bundle.catalogue), sids[None])
    sid_score = logits.log_softmax(-1).gather(-1, sids[None, ..., None]).sum((-1, -2))[0].numpy()
    weight = bundle.catalogue.popularity + 1
    share = [
        weight[i] / weight[(bundle.catalogue.sids == bundle.catalogue.sids[i]).all(1)].sum() for i in range(len(sids))
    ]
    expected = np.sort(sid_score + np.log(share))[::-1][:100]
    np.testing.assert_allclose(best.scores, expected, atol=1e-4)


def test_log_probs_are_the_trainers(bundle: Bundle) -> None:
    """fp32: equal within 1e-4; served under bf16 autocast: within 0.15 of the trainer's fp32."""
    context = random_context(bundle, 8)
    for bf16, tolerance in ((False, 1e-4), (True, 0.15)):
        answers = Recommender(bundle, bf16=bf16).recommend(context, num_items=5, beam_width=16)
        sids = torch.from_numpy(np.stack([answer.sids for answer in answers])).long()
        with torch.no_grad():
            logits = bundle.model(to_tensors(context, bundle.catalogue), sids)
        again = logits.float().log_softmax(-1).gather(-1, sids.unsqueeze(-1)).squeeze(-1).numpy()
        served = np.stack([answer.log_probs for answer in answers])
        assert served.dtype == np.float32
        np.testing.assert_allclose(served, again, atol=tolerance)


@pytest.mark.parametrize("mode", ["beam", "sample"])
def test_seen_and_excluded_items_stay_away(bundle: Bundle, mode: str) -> None:
    context = random_context(bundle, 4)
    ids = bundle.catalogue.item_ids
    exclude = [set(ids[:50]), set(), set(ids[:-2]), set(ids)]
    answers = Recommender(bundle).recommend(context, num_items=100, beam_width=512, mode=mode, exclude=exclude, seed=0)
    for row, answer in enumerate(answers):
        seen = {
            ids[i] for part in (context.short, context.positive, context.lifelong) for i in part.item[row] if i >= 0
        }
        assert not set(answer.item_ids) & (seen | exclude[row])
    assert set(answers[2].item_ids) <= set(ids[-2:])
    assert answers[3].item_ids == []
    assert answers[3].sids.shape == answers[3].log_probs.shape == (0, 3)
    again = Recommender(bundle).recommend(context, num_items=100, beam_width=512, exclude_seen=False)
    assert all(len(answer) == 100 for answer in again)


def test_an_unknown_excluded_item_excludes_nothing(bundle: Bundle) -> None:
    context, recommender = random_context(bundle, 2), Recommender(bundle)
    plain = recommender.recommend(context, num_items=10, beam_width=16)
    unknown = recommender.recommend(context, num_items=10, beam_width=16, exclude=[{"never-seen"}, {"", "\u00e9"}])
    assert [answer.item_ids for answer in plain] == [answer.item_ids for answer in unknown]


def test_a_sid_whose_items_are_half_excluded_serves_the_other_half(bundle: Bundle) -> None:
    rows = np.flatnonzero((bundle.catalogue.sids == bundle.catalogue.sids[-1]).all(1))
    assert len(rows) > 1
    ids = bundle.catalogue.item_ids
    exclude = set(ids) - {ids[rows[-1]]}
    (answer,) = Recommender(bundle).recommend(
        cold_context(1, bundle.limits), num_items=10, beam_width=8, exclude=[exclude]
    )
    assert answer.item_ids == [ids[rows[-1]]]


def test_batching_changes_nothing(bundle: Bundle) -> None:
    context = random_context(bundle, 35)
    recommender = Recommender(bundle)
    together = recommender.recommend(context, num_items=8, beam_width=32)
    for row in (0, 7, 34):
        (alone,) = recommender.recommend(context.take(slice(row, row + 1)), num_items=8, beam_width=32)
        assert alone.item_ids == together[row].item_ids
        np.testing.assert_allclose(alone.log_probs, together[row].log_probs, atol=1e-5)


def test_a_seed_repeats_and_another_does_not(bundle: Bundle) -> None:
    context = random_context(bundle, 4)
    recommender = Recommender(bundle)

    def draw(seed: int | None) -> list[list[str]]:
        found = recommender.recommend(context, num_items=10, beam_width=20, mode="sample", temperature=2.0, seed=seed)
        return [answer.item_ids for answer in found]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_legality_is_the_share_of_real_sids(bundle: Bundle) -> None:
    share = Recommender(bundle).legality(random_context(bundle, 40), samples=50)
    possible = bundle.trie.leaves / 8**3  # the random model is near uniform
    assert 0 < share < 1
    assert share == pytest.approx(possible, abs=0.1)


def test_wrong_arguments_are_named(bundle: Bundle) -> None:
    recommender = Recommender(bundle)
    with pytest.raises(ValueError, match="mode is 'best'"):
        recommender.recommend(cold_context(1, bundle.limits), num_items=1, beam_width=1, mode="best")
    with pytest.raises(ValueError, match="2 rows for 1"):
        recommender.recommend(cold_context(1, bundle.limits), num_items=1, beam_width=1, exclude=[(), ()])
