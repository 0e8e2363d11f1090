"""Evaluation at item level, through the recommender that serves, on held-out requests.

A request's relevant items are those its user engaged with (``features.histories.windows.is_positive``); a ranking is
judged by Recall and NDCG at 10 and 50 beside popularity and ItemKNN, which see the same exclusions. SID-level hits
are never counted: they reward a collapsed tokenizer. Guard-rails: P-Score of the lists, legality of unconstrained
samples, coverage, share of cold items, density (how alike the items of one list are), latency.
"""

import html
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from models.bundle import Bundle
from models.pathways import to_tensors
from models.serving.recommender import Recommender
from models.tokenizer.vocabulary import Catalogue
from models.training.data import Holdout
from monitoring.experiment import Interval, bootstrap_mean

CUTOFFS = (10, 50)
COLD_EXPOSURES = 20
JUDGED = 64
"""Requests that the reward model judges at once."""
TIMED = ("latency_ms",)
"""Metrics that another run of the same work gives anew: not on the card, whose content names a stage."""
Rankings = Sequence[Sequence[str]]


def recommend(recommender: Recommender, holdout: Holdout, *, beam_width: int = 64) -> list[list[str]]:
    """The recommender's best items for each held-out request, as serving would answer."""
    answers = recommender.recommend(
        holdout.context, num_items=max(CUTOFFS), beam_width=beam_width, exclude=holdout.seen
    )
    return [answer.item_ids for answer in answers]


def accuracy(rankings: Rankings, relevant: Sequence[set[str]]) -> dict[str, np.ndarray]:
    """``recall@k`` and ``ndcg@k`` of each request with a relevant item, float64 [requests with one]."""
    judged = [(ranking, wanted) for ranking, wanted in zip(rankings, relevant, strict=True) if wanted]
    result = {}
    for k in CUTOFFS:
        hits = [np.array([item in wanted for item in ranking[:k]], np.float64) for ranking, wanted in judged]
        sizes = [len(wanted) for _, wanted in judged]
        result[f"recall@{k}"] = np.array([h.sum() / size for h, size in zip(hits, sizes, strict=True)])
        result[f"ndcg@{k}"] = np.array([_ndcg(h, size, k) for h, size in zip(hits, sizes, strict=True)])
    return result


def _ndcg(hits: np.ndarray, relevant: int, k: int) -> float:
    """DCG with gain 1 / log2(rank + 1) over that of a perfect ranking of ``relevant`` items cut at k."""
    gains = 1 / np.log2(np.arange(2, k + 2))
    return float((hits * gains[: len(hits)]).sum() / gains[: min(relevant, k)].sum())


def describe(
    rankings: Rankings, holdout: Holdout, catalogue: Catalogue, exposures_of: Mapping[str, int]
) -> dict[str, float]:
    """Means of the accuracy metrics with the bounds of recall@50, and the guard-rails of the top ten."""
    scores = accuracy(rankings, holdout.relevant)
    metrics = {name: float(values.mean()) if len(values) else 0.0 for name, values in scores.items()}
    if len(scores["recall@50"]):
        interval = bootstrap_mean(scores["recall@50"], samples=1000)
        metrics |= {"recall@50_low": interval.low, "recall@50_high": interval.high}
    metrics["requests"] = float(len(scores["recall@50"]))
    top = [list(ranking[:10]) for ranking in rankings]
    shown = [item for ranking in top for item in ranking]
    known = set(catalogue.item_ids)
    metrics["illegal_items"] = float(sum(item not in known for item in shown))
    # Of as many different items as the lists could hold: a few requests cannot cover a large catalogue.
    metrics["coverage"] = len(set(shown)) / max(min(len(catalogue), len(shown)), 1)
    metrics["cold_start_share"] = (
        float(np.mean([exposures_of.get(i, 0) < COLD_EXPOSURES for i in shown])) if shown else 0.0
    )
    metrics["density"] = density(top, catalogue)
    return metrics


def density(rankings: Rankings, catalogue: Catalogue) -> float:
    """Mean share of pairs in one list that share the first SID code: 1 is a list of look-alikes."""
    shares = []
    for ranking in rankings:
        rows = catalogue.rows(list(ranking))
        first = catalogue.sids[rows[rows >= 0], 0]
        if len(first) > 1:
            same = (first[:, None] == first[None, :]).sum() - len(first)
            shares.append(same / (len(first) * (len(first) - 1)))
    return float(np.mean(shares)) if shares else 0.0


def mean_reward(bundle: Bundle, holdout: Holdout, rankings: Rankings) -> float:
    """Mean P-Score of the top tens, as the reward model of ``bundle`` judges them; items it does not know are left out.

    One judge for all rivals: the candidate's, which has seen the newest data.
    """
    assert bundle.reward is not None, "only called for bundles with a reward model"
    device, total, count = bundle.trie.sids.device, 0.0, 0
    for first in range(0, len(rankings), JUDGED):
        part = slice(first, first + JUDGED)
        rows = np.full((len(rankings[part]), 10), -1, np.int64)
        for request, ranking in enumerate(rankings[part]):
            rows[request, : len(ranking[:10])] = bundle.catalogue.rows(list(ranking[:10]))
        context = to_tensors(holdout.context.take(part), bundle.catalogue, device)
        p = bundle.reward.judge(context, rows, bundle.catalogue).p.cpu().numpy()
        total, count = total + float(p[rows >= 0].sum()), count + int((rows >= 0).sum())
    return total / count if count else 0.0


def latency_ms(asked: Mapping[str, tuple[Recommender, Holdout]], requests: int = 20) -> dict[str, float]:
    """Median milliseconds of one request, one user each, by name; the rivals take turns, on this machine, as it is."""
    taken: dict[str, list[float]] = {name: [] for name in asked}
    for number in range(requests + 1):
        for name, (recommender, holdout) in asked.items():
            row = number % max(len(holdout), 1)
            one = holdout.context.take(slice(row, row + 1))
            began = time.perf_counter()
            recommender.recommend(one, num_items=10, beam_width=32)
            taken[name].append(1000 * (time.perf_counter() - began))
    return {name: float(np.median(times[1:])) for name, times in taken.items()}  # the first pays for first times


def compare(rankings: Rankings, rival: Rankings, holdout: Holdout, metric: str = "recall@50") -> Interval:
    """Paired bootstrap over requests of ``metric(rankings) - metric(rival)``."""
    return bootstrap_mean(
        accuracy(rankings, holdout.relevant)[metric] - accuracy(rival, holdout.relevant)[metric], samples=2000
    )


def evaluate(
    candidate: Recommender,
    production: Recommender | None,
    baselines: Mapping[str, Rankings],
    holdout: Holdout,
    production_holdout: Holdout | None,
    exposures_of: Mapping[str, int],
) -> dict[str, Any]:
    """Metrics of the candidate, of the model in production on the same requests, and of the baselines.

    ``production_holdout`` holds the same requests with contexts in the rows of production's own, older catalogue.
    """
    if (production is None) != (production_holdout is None):
        raise ValueError(
            "give production and production_holdout together: its contexts are in its own catalogue's rows"
        )
    catalogue = candidate.bundle.catalogue
    answers = recommend(candidate, holdout)
    judged, asked = {"candidate": answers}, {"candidate": (candidate, holdout)}
    result: dict[str, Any] = {"candidate": describe(answers, holdout, catalogue, exposures_of)}
    result["candidate"]["legality"] = candidate.legality(holdout.context)
    if production is not None and production_holdout is not None:
        theirs = judged["production"] = recommend(production, production_holdout)
        asked["production"] = (production, production_holdout)
        result["production"] = describe(theirs, holdout, catalogue, exposures_of)
        result["production"]["legality"] = production.legality(production_holdout.context)
        interval = compare(answers, theirs, holdout)
        result["candidate_over_production"] = asdict(interval)
        result["candidate"]["over_production_high"] = interval.high
    for name, rankings in baselines.items():
        result[name] = describe(rankings, holdout, catalogue, exposures_of)
        result[f"candidate_over_{name}"] = asdict(compare(answers, rankings, holdout))
    if candidate.bundle.reward is not None:
        for name, rankings in {**judged, **baselines}.items():
            result[name]["reward"] = mean_reward(candidate.bundle, holdout, rankings)
        if "popularity" in result:
            result["candidate"]["reward_lift"] = result["candidate"]["reward"] / result["popularity"]["reward"]
    for name, median in latency_ms(asked).items():
        result[name]["latency_ms"] = median
    return result


def card(result: Mapping[str, Any]) -> str:
    """The evaluation as a small HTML page."""
    columns = [name for name in ("candidate", "production", "itemknn", "popularity") if name in result]
    rows = "".join(
        f"<tr><td>{html.escape(metric)}</td>"
        + "".join(f"<td>{result[name][metric]:.4f}</td>" if metric in result[name] else "<td></td>" for name in columns)
        + "</tr>"
        for metric in result["candidate"]
        if metric not in TIMED
    )
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    return (
        "<!doctype html><meta charset=utf-8><title>Evaluation</title>"
        "<style>body{font:15px system-ui}td,th{padding:.2rem .8rem;text-align:right}</style>"
        f"<h1>Evaluation on held-out requests</h1><table><tr><th></th>{head}</tr>{rows}</table>"
    )
