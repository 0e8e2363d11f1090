"""Format reward: samples that name an item are good, others are dropped (OneRec V1, arXiv 2506.13695, 2.4.2).

RL alone drives legality down: probability squeezed out of bad items lands on codes that no item has. K of the G
unconstrained samples of a request are judged; the advantage is 1 when the SID is legal, else the sample is dropped,
and it is used raw. Choosing the K at random restores legality; choosing the likeliest K gets hacked, because the model
need only make a few of its answers legal. Both are here to be compared. K = 5 of G = 128 in the paper's ablation.

Shapes: B requests, G samples of each.
"""

from typing import Literal

import numpy as np


def random_k(shape: tuple[int, int], k: int, seed: int) -> np.ndarray:
    """bool [B, G]: ``k`` samples of every request, each set of ``k`` as likely as any other."""
    _check(shape[1], k)
    return _first(np.random.default_rng(seed).random(shape), k)


def top_k(log_probs_BG: np.ndarray, k: int) -> np.ndarray:
    """bool [B, G]: the ``k`` likeliest samples of every request; missing (NaN) log-probabilities come last."""
    _check(log_probs_BG.shape[1], k)
    return _first(-np.nan_to_num(log_probs_BG.astype(np.float64), nan=-np.inf), k)


def format_advantage(legal_BG: np.ndarray, chosen_BG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(advantages float32 [B, G], mask bool [B, G]): 1 for chosen legal samples; nothing else takes part.

    Raises ValueError when the shapes differ.
    """
    if legal_BG.shape != chosen_BG.shape:
        raise ValueError(f"legal is {legal_BG.shape} and chosen {chosen_BG.shape}; both must be [requests, samples]")
    kept = np.asarray(legal_BG, bool) & np.asarray(chosen_BG, bool)
    return kept.astype(np.float32), kept


def chosen(choice: Literal["random", "top"], log_probs_BG: np.ndarray, k: int, seed: int) -> np.ndarray:
    """bool [B, G] by either rule."""
    return random_k(log_probs_BG.shape, k, seed) if choice == "random" else top_k(log_probs_BG, k)


def _first(keys: np.ndarray, k: int) -> np.ndarray:
    mask = np.zeros(keys.shape, bool)
    np.put_along_axis(mask, np.argsort(keys, 1, kind="stable")[:, :k], True, 1)
    return mask


def _check(samples: int, k: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k} of {samples} samples a request; it must be in 1 .. {samples}")
