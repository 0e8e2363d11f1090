"""Reward selection: the generated candidates in the order of the bundle's P-Score (OneRec V1, arXiv 2506.13695, 4.2).

The bare generator ties the cascade it replaces; the paper's headline needs the reward model to choose among what the
beam found. A bundle without a reward model answers in the beam's own order, and the answer says so (``NO_REWARD``).
Left out: choosing between whole lists by the session reward.

Shapes: B requests, T candidates of the longest list.
"""

from collections.abc import Sequence

import numpy as np

from features.histories.context import Context
from models.bundle import Bundle
from models.pathways import to_tensors

SELECTIONS = ("model", "reward")
NO_REWARD = "no_reward_model"
"""Flag of an answer that was to be selected by reward from a bundle that has no reward model."""


def check_select(select: str, mode: str) -> None:
    """Raises ValueError for an unknown way to select, or by reward where the order is not to be changed."""
    if select not in SELECTIONS:
        raise ValueError(f"select is {select!r}; expected one of {', '.join(SELECTIONS)}")
    if select == "reward" and mode != "beam":
        raise ValueError(f"select is 'reward', which belongs to mode 'beam'; the mode is {mode!r}")


def order_by_reward(bundle: Bundle, context: Context, candidates: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """For each of the B requests the indices of its candidates, highest P-Score first; ties keep their order.

    Every candidate must be in the bundle's catalogue. Raises ValueError when the bundle has no reward model.
    """
    if bundle.reward is None:
        raise ValueError(f"bundle {bundle.version} has no reward model; train one or select by the model")
    rows = np.full((len(candidates), max(map(len, candidates), default=0)), -1, np.int64)
    for request, items in enumerate(candidates):
        rows[request, : len(items)] = bundle.catalogue.rows(items)
    if not rows.size:
        return [np.empty(0, np.int64) for _ in candidates]
    device = bundle.trie.sids.device
    judged = bundle.reward.judge(to_tensors(context, bundle.catalogue, device), rows, bundle.catalogue)
    p = judged.p.cpu().numpy()
    return [np.argsort(-p[request, : len(items)], kind="stable") for request, items in enumerate(candidates)]
