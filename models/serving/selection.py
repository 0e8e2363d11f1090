"""Reward selection: what the beam found in the order of the bundle's reward model (OneRec V1, arXiv 2506.13695, 4.2).

The bare generator ties the cascade it replaces; the paper's headline needs the reward model to choose among what the
beam found. ``reward`` orders by the P-Score, ``stay`` (ours) by predicted seconds of watching. A bundle without what is
asked for answers in the beam's own order, and the answer says so (``NO_REWARD``). Left out: choosing between whole
lists by the session reward.

Shapes: B requests, T candidates of the longest list.
"""

from collections.abc import Sequence

import numpy as np

from features.histories.context import Context
from models.bundle import Bundle
from models.pathways import to_tensors

SELECTIONS = ("model", "reward", "stay")
NO_REWARD = "no_reward_model"
"""Flag of an answer that was to be selected by reward from a bundle whose reward model cannot, or that has none."""


def check_select(select: str, mode: str) -> None:
    """Raises ValueError for an unknown way to select, or by reward where the order is not to be changed."""
    if select not in SELECTIONS:
        raise ValueError(f"select is {select!r}; expected one of {', '.join(SELECTIONS)}")
    if select != SELECTIONS[0] and mode != "beam":
        raise ValueError(f"select is {select!r}, which belongs to mode 'beam'; the mode is {mode!r}")


def can_select(bundle: Bundle, select: str) -> bool:
    """Whether the bundle has what ``select`` asks for."""
    if select == "model":
        return True
    return bundle.reward is not None and (select == "reward" or bundle.reward.stay is not None)


def order_by_reward(
    bundle: Bundle, context: Context, candidates: Sequence[Sequence[str]], select: str = "reward"
) -> list[np.ndarray]:
    """For each of the B requests the indices of its candidates, the best judged first; ties keep their order.

    ``select`` is "reward" or "stay". Every candidate must be in the bundle's catalogue. Raises ValueError when the
    bundle has no reward model that can tell.
    """
    if bundle.reward is None:
        raise ValueError(f"bundle {bundle.version} has no reward model; train one or select by the model")
    rows = np.full((len(candidates), max(map(len, candidates), default=0)), -1, np.int64)
    for request, items in enumerate(candidates):
        rows[request, : len(items)] = bundle.catalogue.rows(items)
    if not rows.size:
        return [np.empty(0, np.int64) for _ in candidates]
    tensors = to_tensors(context, bundle.catalogue, bundle.trie.sids.device)
    if select == "stay":
        worth = bundle.reward.seconds(tensors, rows, bundle.catalogue)
    else:
        worth = bundle.reward.judge(tensors, rows, bundle.catalogue).p.cpu().numpy()
    return [np.argsort(-worth[request, : len(items)], kind="stable") for request, items in enumerate(candidates)]
