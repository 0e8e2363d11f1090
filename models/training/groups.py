"""From a step's roll-outs to what is learned from each: rewards, industrial rules, group advantages, format reward.

OneRec V1 (arXiv 2506.13695) 2.4: the P-Score of what was generated is normalised inside the group of one user; some of
the samples are judged by format instead. A draw that names no item has no reward and takes no part; a group whose
rewards are equal teaches nothing. Ours: predicted stay may stand in for the P-Score, which knows no seconds. Left out:
rewards of whole lists.

Shapes: B requests, G samples of each, R rules, n items.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from models.objectives.policy import group_advantages
from models.pathways import ContextTensors
from models.rewards.format import chosen, format_advantage
from models.rewards.industrial import Rule, industrial_reward, kinds, shares
from models.rewards.reward import RewardModel
from models.tokenizer.vocabulary import Catalogue
from models.training.alignment import AlignConfig, Worth
from models.training.rollouts import Samples

MEMORY = 0.9
"""How much of the shares of served kinds a step keeps of the steps before."""


class Reward(Protocol):
    """How good items are for the users of B requests."""

    def __call__(self, context: ContextTensors, items: np.ndarray, requests: np.ndarray) -> np.ndarray:
        """float [B, G] for the catalogue's rows ``items`` [B, G] (-1 = none); NaN is "cannot tell".

        ``requests`` [B] are the numbers under which the requests were asked for (``on_policy.Asked``).
        """


def rewarded(reward: RewardModel, catalogue: Catalogue, by: Worth = "pscore") -> Reward:
    """The P-Score of a bundle's reward model, or its predicted stay in seconds.

    Raises RewardMismatch when it is another catalogue's, ValueError when it knows no seconds and is asked for them.
    """
    reward.check(catalogue)
    if by == "stay" and reward.stay is None:
        raise ValueError("align.worth is 'stay', but this reward model knows no seconds; train it again")

    def judge(context: ContextTensors, items: np.ndarray, requests: np.ndarray) -> np.ndarray:
        if by == "stay":
            found = reward.seconds(context, items, catalogue)
        else:
            found = reward.judge(context, items, catalogue).p.cpu().numpy()
        return np.where(items >= 0, found, np.nan)

    return judge


class Kinds:
    """Industrial rules over a catalogue, with the share that each kind has of what the policy generates."""

    def __init__(self, rules: tuple[Rule, ...], items: pa.Table, popularity: np.ndarray, now_ms: int) -> None:
        self._rules = rules
        self._kinds = kinds(rules, items, popularity, now_ms)
        self._shares: np.ndarray | None = None

    def __call__(self, rewards: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        """The rewards [B, G] after the rules in force; shares are those of recent steps, this one's included."""
        now = shares(self._kinds, items.ravel())
        self._shares = now if self._shares is None else MEMORY * self._shares + (1 - MEMORY) * now
        changed, touched = industrial_reward(rewards, items, self._rules, self._kinds, self._shares)
        names = [rule.name for rule in self._rules]
        return changed, {**touched, **{f"share/{name}": float(x) for name, x in zip(names, self._shares, strict=True)}}


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One step's groups, judged."""

    rewards: Tensor
    """[B, G] float32, after the rules; NaN where there is none."""
    advantages: Tensor
    """[B, G] float32, normalised inside the group; 0 in a group of equal rewards."""
    mask: Tensor
    """[B, G] bool, has a reward."""
    format_advantages: Tensor
    format_mask: Tensor
    """Both all zero without a format reward."""
    metrics: dict[str, float]

    def extremes(self, count: int) -> Tensor:
        """long [B, count]: the samples that each group says most about, its best and its worst in equal numbers."""
        order = torch.where(self.mask, self.advantages, 0.0).argsort(stable=True, dim=1)
        return torch.cat([order[:, : count // 2], order[:, order.shape[1] - (count - count // 2) :]], 1)

    def take(self, chosen: Tensor) -> "Judged":
        """Only the samples ``chosen`` (long [B, k]); metrics stay those of all."""
        names = ("rewards", "advantages", "mask", "format_advantages", "format_mask")
        return replace(self, **{name: getattr(self, name).gather(1, chosen) for name in names})


def judge_groups(samples: Samples, rewards: np.ndarray, config: AlignConfig, rules: Kinds | None, seed: int) -> Judged:
    """Advantages of the ``samples`` from their raw ``rewards`` [B, G]; not finite ones take no part."""
    if rewards.shape != samples.items.shape:
        raise ValueError(f"rewards are {rewards.shape}, the samples {samples.items.shape}; give one for each")
    mask = samples.valid & np.isfinite(rewards)
    raw = found = np.where(mask, rewards, np.nan).astype(np.float32)
    told: dict[str, float] = {}
    if rules is not None:
        found, told = rules(found, samples.items)
    reward, keep = torch.from_numpy(found), torch.from_numpy(mask)
    advantages = group_advantages(reward, keep)
    formed, form_mask = _format(samples, config, seed)
    metrics = {
        "rollouts/reward": float(np.nanmean(raw)) if mask.any() else 0.0,
        "rollouts/legality": samples.legality,
        "rollouts/distinct": _distinct(samples),
        "rollouts/flat_share": float((advantages == 0).all(1).float().mean()),
        "rollouts/positives": float((advantages > 0).sum()),
        "rollouts/staleness": float(samples.staleness.mean()),
        "rollouts/push": float(samples.push.max()),
        **told,
    }
    return Judged(
        rewards=reward,
        advantages=advantages,
        mask=keep,
        format_advantages=torch.from_numpy(formed),
        format_mask=torch.from_numpy(form_mask),
        metrics=metrics,
    )


def _format(samples: Samples, config: AlignConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    if config.format == "none":
        return np.zeros(samples.items.shape, np.float32), np.zeros(samples.items.shape, bool)
    picked = chosen(config.format, samples.log_probs.sum(-1).numpy(), config.format_samples, seed)
    return format_advantage(samples.valid, picked & samples.drawn)


def _distinct(samples: Samples) -> float:
    """Mean share of a group's draws that are different SIDs: falls when the policy collapses."""
    if not samples.drawn.any():
        return 0.0
    counts = [
        len(row[there].unique(dim=0)) / max(int(there.sum()), 1)
        for row, there in zip(samples.tokens, torch.from_numpy(samples.drawn), strict=True)
    ]
    return float(np.mean(counts))
