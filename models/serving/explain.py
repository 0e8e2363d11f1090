"""Why a user is shown what: the pathways, the beam as a tree of semantic IDs with probabilities, and what was filtered.

The same context and recommender as serving, asked twice: once as a request would be, once with nothing filtered. What
only the second answer names was filtered, and for each such item the reason is looked up (taken down, excluded by the
request, seen in a pathway); what both name but the request does not show came after its last item. Probabilities are
the model's own, before filters, of each token given those before it (OneRec-V2, arXiv 2508.20900, 3.1.2). The result
is plain JSON; ``monitoring.explanation`` draws it. Left out: which behaviours moved the answer (attributions).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from features.histories.context import STATIC_FIELDS, Context, from_windows
from features.histories.windows import Window, empty_window
from features.online import UserFeatures
from features.schema import FLAGS
from models.bundle import Bundle
from models.pathways import PATHWAYS
from models.serving.recommender import Recommendation, Recommender

EVERYTHING = 100_000
"""More items than any beam names."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked, as a request would say it."""

    user_id: str
    time_ms: int
    num_items: int = 10
    beam_width: int = 64
    exclude: Collection[str] = field(default_factory=tuple)


def explain(bundle: Bundle, user: UserFeatures | None, question: Question) -> dict[str, Any]:
    """The explanation as JSON values; ``user`` None is one of whom nothing can be known now."""
    context = _context(bundle, user, question.time_ms)
    options: dict[str, Any] = {"beam_width": question.beam_width}
    (shown,) = Recommender(bundle).recommend(
        context, num_items=question.num_items, exclude=[question.exclude], **options
    )
    unfiltered = Recommender(replace(bundle, blocked=frozenset()))
    (free,) = unfiltered.recommend(context, num_items=EVERYTHING, exclude_seen=False, **options)
    seen = _seen(bundle, context)
    about = _About(bundle)
    rank = {item: place for place, item in enumerate(shown.item_ids)}
    found: dict[str, dict[str, Any]] = {}
    for answer in (free, shown):
        for row, item in enumerate(answer.item_ids):
            why = _why(item, rank, bundle.blocked, question.exclude, seen)
            found.setdefault(item, {**about.item(item), **why, **_scores(answer, row)})
    items = sorted(found.values(), key=lambda each: -each["score"])
    return {
        "user": question.user_id,
        "model_version": bundle.version,
        "time_ms": question.time_ms,
        "num_items": question.num_items,
        "beam_width": question.beam_width,
        "flag": "features_unavailable" if user is None else user.flag,
        "expired": list(user.expired) if user else [],
        "static": [] if user is None or user.static is None else [int(bucket) for bucket in user.static if bucket],
        "pathways": [_pathway(name, getattr(user, name, None), question.time_ms, about) for name in PATHWAYS],
        "items": items,
        "tree": tree(items),
    }


def _context(bundle: Bundle, user: UserFeatures | None, time_ms: int) -> Context:
    """The context of one user, as the server builds it."""
    static = np.zeros(STATIC_FIELDS, np.int64) if user is None or user.static is None else user.static
    short, positive, lifelong = ([getattr(user, name, None) or empty_window()] for name in PATHWAYS)
    times = np.array([time_ms], np.int64)
    return from_windows(static, short, positive, lifelong, times, bundle.catalogue.index, bundle.limits)


def _seen(bundle: Bundle, context: Context) -> dict[str, str]:
    """Item id -> the pathway that holds it, for everything in the model's context."""
    ids = bundle.catalogue.item_ids
    found: dict[str, str] = {}
    for name in PATHWAYS:
        rows = getattr(context, name).item[0]
        for row in rows[rows >= 0]:
            found.setdefault(ids[row], name)
    return found


def _why(
    item: str,
    rank: Mapping[str, int],
    blocked: Collection[str],
    excluded: Collection[str],
    seen: Mapping[str, str],
) -> dict[str, Any]:
    """``status`` and, where it helps, ``place`` among the shown items or ``detail``."""
    if item in rank:
        return {"status": "shown", "place": rank[item] + 1}
    if item in blocked:
        return {"status": "taken down"}
    if item in excluded:
        return {"status": "excluded"}
    if item in seen:
        return {"status": "seen", "detail": seen[item]}
    return {"status": "not among the best"}


def _scores(answer: Recommendation, row: int) -> dict[str, Any]:
    log_probs = answer.log_probs[row].astype(float)
    score = float(answer.scores[row])
    return {
        "sid": answer.sids[row].tolist(),
        "log_probs": log_probs.tolist(),
        "score": score,
        "probability": float(np.exp(score)),
        # p(item) = p(SID) * the item's share of its SID (models.serving.recommender)
        "share_of_sid": float(np.exp(score - log_probs.sum())),
    }


class _About:
    """Titles and tags of the bundle's items."""

    def __init__(self, bundle: Bundle) -> None:
        self._catalogue = bundle.catalogue
        self._tags = None if bundle.catalogue.items is None else bundle.catalogue.items.column("tags")

    def item(self, item_id: str) -> dict[str, Any]:
        """Names of an item; those of one outside the catalogue are empty."""
        (row,) = self._catalogue.rows([item_id])
        known = row >= 0
        tags = self._tags[int(row)].as_py() if known and self._tags is not None else None
        title = self._catalogue.titles[row] if known else ""
        return {"item_id": item_id, "title": title, "tags": tags or [], "in_catalogue": bool(known)}


def _pathway(name: str, window: Window | None, time_ms: int, about: _About) -> dict[str, Any]:
    """The events of a pathway before ``time_ms``, newest first."""
    window = window or empty_window()
    events = [
        {
            **about.item(str(window.item_ids[row])),
            "time_ms": int(window.times[row]),
            "play_ms": int(window.play_ms[row]),
            "duration_ms": int(window.duration_ms[row]),
            "feedback": [flag for bit, flag in enumerate(FLAGS) if int(window.labels[row]) >> bit & 1],
        }
        for row in reversed(range(len(window)))
        if window.times[row] < time_ms
    ]
    return {"name": name, "events": events}


def tree(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """SIDs merged by their prefixes: {code, p, path_p, children or items}, likeliest first; the root has no code.

    ``p`` is the probability of the code given those before it, ``path_p`` of the whole prefix.
    """
    root: dict[str, Any] = {"code": None, "p": 1.0, "path_p": 1.0, "children": {}, "items": []}
    for item in items:
        node = root
        for code, log_prob in zip(item["sid"], item["log_probs"], strict=True):
            probability = float(np.exp(log_prob))
            fresh = {
                "code": code,
                "p": probability,
                "path_p": node["path_p"] * probability,
                "children": {},
                "items": [],
            }
            node = node["children"].setdefault(code, fresh)
        node["items"].append(item["item_id"])
    return _listed(root)


def _listed(node: Mapping[str, Any]) -> dict[str, Any]:
    children = sorted((_listed(child) for child in node["children"].values()), key=lambda child: -child["path_p"])
    return {**node, "children": children}
