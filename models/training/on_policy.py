"""The alignment step: next-token loss on logged sessions, and a policy objective on feedback, roll-outs or both.

OneRec V1 (arXiv 2506.13695) 2.4 and 3.3: roll-outs of a few users, from weights pushed every N steps, judged by the
reward model, beside RSFT as the anchor. OneRec-V2 (2508.20900) 3.1: feedback on logged exposures through GBPO. O1
(2502.18965) Alg. 2: best against worst of the beam, reference = the weights at the start. The stage
(``models.training.align``) and the laboratory (``align_on_rollouts``, no files) run the same step in the same loop.
Left out: lists of session models.

Shapes: B requests, T exposures or G roll-outs of each, L SID levels, C codes.
"""

import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from features.histories.context import Context
from models.generator import Generator
from models.objectives.dpo import dpo_loss, self_hard
from models.objectives.ecpo import ecpo_loss
from models.objectives.gbpo import gbpo_loss
from models.objectives.grpo import grpo_loss
from models.objectives.ntp import ntp_loss
from models.objectives.policy import divergence, entropy, guards, token_log_probs
from models.pathways import ContextTensors, to_tensors
from models.rewards.hybrid import hybrid_weights
from models.tokenizer.vocabulary import Catalogue
from models.training.alignment import PREFERENCES, AlignConfig
from models.training.checkpoint import LOG
from models.training.device import rank, world
from models.training.groups import Judged, Kinds, Reward, judge_groups
from models.training.loop import Loss, Plan, fit
from models.training.parallel import sharded
from models.training.rollouts import Sampler, Samples

COMPARED = 4
"""Requests of a step on which the policy is compared with the pre-trained one."""


@dataclass(frozen=True, kw_only=True)
class Logged:
    """A batch of logged exposures with what they teach; padding has mask False and codes -1."""

    context: ContextTensors
    targets: Tensor
    """[B, T, L] long."""
    mask: Tensor
    """[B, T] bool."""
    weights: Tensor
    """[B, T] in the next-token loss; 0 where RSFT drops the session."""
    advantages: Tensor
    """[B, T] of the feedback; NaN: the policy does not learn from this one."""
    old_log_probs: Tensor
    """[B, T, L] as the server logged them; NaN where it did not."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The requests that may be rolled out, by number."""

    count: int
    of: Callable[[np.ndarray], Context]
    """The contexts of the requests with the numbers given."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollouts:
    """All that roll-outs need."""

    asked: Asked
    reward: Reward
    sampler: Sampler
    catalogue: Catalogue
    items: pa.Table | None = None
    """ITEM rows of the catalogue; industrial rules need them."""
    now_ms: int = 0
    """What the age of items is counted to."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Input of part ``number`` of the training."""

    number: int
    logged: Logged | None


class Alignment:
    """The objective of an alignment step, for the fit loop; ``health`` are measures taken now and then."""

    def __init__(self, model: Generator, config: AlignConfig, rollouts: Rollouts | None) -> None:
        if config.rolls_out != (rollouts is not None):
            raise ValueError(f"signal {config.signal!r} needs {'' if config.rolls_out else 'no '}roll-outs")
        if model.items > 1 and config.rolls_out:
            raise ValueError("roll-outs are of single items; align a model of sessions on exposures")
        self._model, self._config = model, config
        self._pretrained = copy.deepcopy(model).eval().requires_grad_(False)
        sharded(self._pretrained, config)
        self._stream = _Stream(model, self._pretrained, config, rollouts) if rollouts is not None else None
        self.health: dict[str, float] = {}

    def __call__(self, model: nn.Module, step: Step) -> Loss:
        """The loss of one part of a step, on whichever streams it has."""
        metrics = dict(self.health)
        total, count, tokens = torch.zeros((), device=next(self._model.parameters()).device), 0, 0
        feedback: Tensor | None = None
        learned = 0
        if step.logged is not None:
            ntp, feedback, parts = self._on_exposures(model, step.logged)
            total, metrics = total + ntp, metrics | (parts if self._stream is None else _renamed(parts))
            count, learned = int(step.logged.mask.sum()), int(step.logged.advantages[step.logged.mask].isfinite().sum())
            tokens = count * step.logged.targets.shape[-1]
        rolled: Tensor | None = None
        judged = 0
        if self._stream is not None:
            rolled, judged, parts = self._stream.loss(model, step.number)
            metrics |= parts
            tokens += judged * self._model.config.levels
        total = total + self._config.policy_weight * self._mixed(feedback, learned, rolled, judged)
        weight = count or judged
        return Loss(total, metrics, weight, tokens, weight=max(weight, 1))

    def _mixed(self, feedback: Tensor | None, learned: int, rolled: Tensor | None, judged: int) -> Tensor | float:
        if rolled is None or feedback is None:
            found = rolled if feedback is None else feedback
            return 0.0 if found is None else found
        of_feedback, of_model = hybrid_weights(learned, judged, model_share=self._config.model_share)
        return of_feedback * feedback + of_model * rolled

    def _on_exposures(self, model: nn.Module, batch: Logged) -> tuple[Tensor, Tensor | None, dict[str, float]]:
        """The next-token loss, the feedback's GBPO loss if that is learned from, and both's metrics."""
        logits = model(batch.context, batch.targets)
        ntp = ntp_loss(logits, batch.targets, batch.weights, self._model.level_loss)
        found = {"ntp": float(ntp.detach()), "entropy": entropy(logits, batch.mask)}
        if self._stream is None:  # roll-outs say it themselves
            found["policy/kl_pretrained"] = self._moved(model, batch.context, batch.targets, batch.mask)
        if self._config.objective == "rsft" or self._config.signal == "rollouts":
            return ntp, None, found
        stream = (logits, batch.targets, batch.advantages, batch.old_log_probs, batch.mask)
        gbpo, parts = gbpo_loss(*stream)
        return ntp, gbpo, found | parts | guards(*stream) | {"gbpo": float(gbpo.detach())}

    def _moved(self, model: nn.Module, context: ContextTensors, targets: Tensor, mask: Tensor) -> float:
        some = (taken(context, slice(0, COMPARED)), targets[:COMPARED])
        with torch.no_grad(), certain(self._model):
            return divergence(model(*some), self._pretrained(*some), mask[:COMPARED])


class _Stream:
    """Roll-outs of a step and what they teach."""

    def __init__(self, model: Generator, pretrained: Generator, config: AlignConfig, given: Rollouts) -> None:
        if not given.asked.count:
            raise ValueError("there is no request to roll out; raise users_share, or give more data")
        self._model, self._pretrained, self._config, self._given = model, pretrained, config, given
        self._rules = _kinds_of(config, given)
        self._started = self._waited = 0.0
        self._drawn = 0

    def loss(self, model: nn.Module, number: int) -> tuple[Tensor, int, dict[str, float]]:
        """The policy loss of part ``number``, how many roll-outs were judged, and metrics."""
        config, given = self._config, self._given
        requests, seed = self._requests(number)
        context = given.asked.of(requests)
        started = time.perf_counter()
        given.sampler.advance(self._model, number // config.accumulate)
        samples = given.sampler.draw(context, config.group, seed=seed, mode=config.mode)
        waited = time.perf_counter() - started
        device = next(self._model.parameters()).device
        tensors = to_tensors(context, given.catalogue, device)
        rewards = given.reward(tensors, samples.items, requests)
        kept, judged = samples, judge_groups(samples, np.asarray(rewards), config, self._rules, seed)
        if config.learned:
            chosen = judged.extremes(config.learned)
            kept, judged = samples.take(chosen), judged.take(chosen)
        tokens = kept.tokens.to(device)
        with certain(self._model):
            logits = model(tensors, tokens)
        # Preferences need the reference of every sample, the comparison is content with a few requests.
        some = slice(None if config.objective in PREFERENCES else COMPARED)
        with torch.no_grad():
            before = self._pretrained(taken(tensors, some), tokens[some])
        value, parts = group_loss(logits, before, kept, judged, config)
        drawn = torch.from_numpy(kept.drawn[some]).to(device)
        parts |= {"policy/kl_pretrained": divergence(logits.detach()[some], before, drawn)}
        return value, int(judged.mask.sum()), judged.metrics | parts | self._waiting(samples, waited, started)

    def _requests(self, number: int) -> tuple[np.ndarray, int]:
        """Which requests part ``number`` rolls out on this worker, and the seed of their draws."""
        config = self._config
        wanted = max(config.rollout_requests // (config.accumulate * world()), 1)
        rng = np.random.default_rng((config.seed, number, rank()))
        rows = rng.choice(self._given.asked.count, min(wanted, self._given.asked.count), replace=False)
        return np.sort(rows), int(rng.integers(2**31))

    def _waiting(self, samples: Samples, waited: float, started: float) -> dict[str, float]:
        """Seconds this step waited for samples; samples a second and the share of all time waited for, so far."""
        self._started = self._started or started
        self._waited += waited
        self._drawn += int(samples.drawn.sum())
        # What lies after the samples of this step is not over yet: the share is a little high at the beginning.
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        return {
            "rollouts/wait_s": waited,
            "rollouts/wait_share": min(self._waited / elapsed, 1.0),
            "rollouts/samples_per_s": self._drawn / max(self._waited, 1e-9),
        }


def _renamed(parts: Mapping[str, float]) -> dict[str, float]:
    """The exposures' metrics beside those of roll-outs."""
    return {name if name in ("ntp", "entropy") else f"feedback/{name}": value for name, value in parts.items()}


def _kinds_of(config: AlignConfig, given: Rollouts) -> Kinds | None:
    if not config.industrial:
        return None
    if given.items is None or given.items.num_rows != len(given.catalogue):
        raise ValueError(f"industrial rules need the ITEM rows of all {len(given.catalogue)} items of the catalogue")
    return Kinds(config.industrial, given.items, given.catalogue.popularity, given.now_ms)


def group_loss(
    logits_BGLC: Tensor, before_BGLC: Tensor, samples: Samples, judged: Judged, config: AlignConfig
) -> tuple[Tensor, dict[str, float]]:
    """The configured objective on judged groups, with the format reward's part; ``before`` are the reference's logits,
    which only preferences read.

    A group of equal rewards and a batch without positives give a finite loss that moves nothing.
    """
    device = logits_BGLC.device
    tokens, old = samples.tokens.to(device), samples.log_probs.to(device)
    advantages, mask = judged.advantages.to(device), judged.mask.to(device)
    stream = (logits_BGLC, tokens, advantages, old, mask)
    found = guards(*stream)
    if config.objective in PREFERENCES:
        value, parts = _preferences(logits_BGLC, before_BGLC, tokens, judged, config)
        return value, found | parts
    value, parts = _policy(*stream, config)
    found |= parts
    if config.format != "none":
        formed, legal = judged.format_advantages.to(device), judged.format_mask.to(device)
        extra, _ = _policy(logits_BGLC, tokens, formed, old, legal, config)
        value = value + config.format_weight * extra
        found["format/kept_share"] = float(legal.sum() / (len(legal) * config.format_samples))
    return value, found


def _policy(
    logits: Tensor, tokens: Tensor, advantages: Tensor, old: Tensor, mask: Tensor, config: AlignConfig
) -> tuple[Tensor, dict[str, float]]:
    if config.objective == "gbpo":
        return gbpo_loss(logits, tokens, advantages, old, mask)
    clipped = ecpo_loss if config.objective == "ecpo" else grpo_loss
    return clipped(logits, tokens, advantages, old, mask, config.clip)


def _preferences(
    logits: Tensor, before: Tensor, tokens: Tensor, judged: Judged, config: AlignConfig
) -> tuple[Tensor, dict[str, float]]:
    pairs = self_hard(judged.rewards.to(logits.device), judged.mask.to(logits.device), losers=config.losers_used)
    log_pi, reference = (token_log_probs(each, tokens).sum(-1) for each in (logits, before))
    winner = pairs.winner[:, None]
    return dpo_loss(
        log_pi.gather(1, winner)[:, 0],
        log_pi.gather(1, pairs.losers),
        reference.gather(1, winner)[:, 0],
        reference.gather(1, pairs.losers),
        pairs.usable,
        beta=config.beta,
    )


def align_on_rollouts(
    model: Generator,
    config: AlignConfig,
    *,
    rollouts: Rollouts | None = None,
    logged: Callable[[int], Logged] | None = None,
    guard: Callable[[], str | None] | None = None,
    steps: int = 0,
) -> dict[str, Any]:
    """Aligns ``model`` in place for ``steps`` (0: ``config.max_steps``), without Ray and without a run's files.

    ``logged(number)`` gives the exposures of part ``number``: the anchor, and with signal "exposures" or "hybrid" the
    feedback; None trains without an anchor. ``guard`` is asked every ``config.checkpoint_every`` steps. Returns the
    last record with ``step`` and ``stopped``; ``history`` is one record for every ``config.log_every`` steps.
    """
    steps = steps or config.max_steps
    if steps < 1 or (rollouts is None and logged is None):
        raise ValueError(f"{steps} steps given, {'no ' if logged is None else ''}exposures: there is nothing to learn")
    objective = Alignment(model, config, rollouts)
    plan = Plan(
        steps=steps,
        example=lambda number: Step(number=number, logged=logged(number) if logged is not None else None),
        objective=objective,
        training={},
        guard=guard,
    )
    with tempfile.TemporaryDirectory(prefix="onerec-align-") as folder:
        metrics = fit(model, plan, config, Path(folder))
        records = [json.loads(line) for line in Path(folder, LOG).read_text().splitlines()]
    return {**metrics, "history": records}


@contextmanager
def certain(model: nn.Module) -> Iterator[None]:
    """Without dropout, as the sampler computes: with it every ratio would be noise."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def taken(context: ContextTensors, rows: slice) -> ContextTensors:
    """Some of the requests of ``context``."""
    parts: Mapping[str, Tensor] = {field.name: getattr(context, field.name) for field in fields(context)}
    return ContextTensors(**{name: part if name == "kind" else part[rows] for name, part in parts.items()})
