"""The stage ``align``: RSFT and a policy objective, on logged exposures, on roll-outs, or on both.

RSFT (OneRec V1, arXiv 2506.13695, 3.3) drops the bottom half of the exposure sessions by play time and keeps the
pre-training loss on the rest; a session is a request here. The nightly default adds GBPO (OneRec-V2, arXiv 2508.20900,
3.1.2), which learns from the duration-aware advantage of every exposure (3.1.1), against the probability logged when we
served it ourselves, else against the current one; ``own_share`` sets how many of those exposures are our own. With
another ``signal`` a few users' requests are rolled out and judged by the run's reward model (V1 2.4). The step itself
is in ``models.training.on_policy``.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import nn

from features.settings import settings
from models.decoding.sample import sample
from models.pathways import to_tensors
from models.rewards.duration import DurationAdvantage, DurationConfig, duration_aware_advantage
from models.rewards.reward import REWARD, load_reward
from models.tokenizer.vocabulary import Catalogue
from models.training import checkpoint
from models.training.alignment import AlignConfig
from models.training.data import OWN, Contexts, RunData, hashed
from models.training.groups import rewarded
from models.training.loop import Loss, fit
from models.training.on_policy import Alignment, Asked, Logged, Rollouts, Step
from models.training.parallel import shards
from models.training.ray import launch
from models.training.rollout_server import ServerSampler
from models.training.rollouts import InProcessSampler, Names, Sampler
from models.training.sessions import per_request
from models.training.stage import Example, Job, Workshop

RECALL = "holdout/recall_level1"
ROLLOUT_SEED = 1
"""Other users are rolled out than held out."""
LEGALITY_REQUESTS, LEGALITY_SAMPLES = 64, 16
"""Of each check of the guard."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AlignJob(Job[AlignConfig]):
    """An alignment; ``reward`` is the folder of the reward model that judges roll-outs."""

    reward: Path | None = None

    def fingerprint(self) -> dict[str, Any]:
        """With the reward model, if there is one."""
        judge = checkpoint.sha256(self.reward / REWARD) if self.reward is not None else ""
        return {**super().fingerprint(), **({"reward": judge} if judge else {})}


def align(
    data: Path,
    catalogue: Catalogue,
    config: AlignConfig,
    output: Path,
    *,
    init: Path,
    reward: Path | None = None,
    ray_address: str = "",
    name: str = "align",
    workers: int = 1,
    store: str = "",
) -> dict[str, Any]:
    """Aligns the weights in folder ``init`` on the run's exposures; outputs and resumption as ``pretrain``.

    ``reward`` is the output folder of ``train_reward``, needed for roll-outs. They come from the model server of role
    ``rollout`` at ONEREC_ROLLOUT_URL, or from this process when none is configured. Raises RewardMismatch,
    RolloutsUnavailable, RolloutsRefused (on Ray: TrainingFailed with their message).
    """
    if config.rolls_out and reward is None:
        raise ValueError(f"signal {config.signal!r} needs a reward model: give the folder of a trained one")
    model = checkpoint.read_config(init)
    job = AlignJob(
        stage="align",
        data=data,
        catalogue=catalogue,
        model=model,
        config=config,
        output=output,
        init=init,
        store=store,
        reward=reward.absolute() if reward is not None and config.rolls_out else None,
    )
    return launch(train, job, ray_address=ray_address, name=name, workers=workers)


def train(job: AlignJob) -> dict[str, Any]:
    """What each worker runs."""
    shop = Workshop(job)
    before = shop.measure()
    judged = advantages(shop.data, job.config)
    with _rollouts(shop, job) as rollouts:
        objective = Alignment(shop.model, job.config, rollouts)
        health = Health(shop, before, objective)
        told = told_of(shop, judged.advantage)

        def step(model: nn.Module, example: Example) -> Loss:
            return objective(model, Step(number=example.number, logged=told(example)))

        plan = shop.plan(shop.batches(), step, health.guard)
        metrics = fit(shop.model, plan, job.config, job.output)
    kept = {f"{name}_before": value for name, value in before.items() if name != "holdout/targets"}
    return shop.finish({**metrics, **judged.metrics, **kept})


class Health:
    """Held-out recall and the legality of free samples, measured before every checkpoint; recall is guarded."""

    def __init__(self, shop: Workshop[AlignConfig], before: dict[str, float], objective: Alignment) -> None:
        self._shop, self._before, self._objective = shop, before[RECALL], objective
        self._guards = before["holdout/targets"] >= shop.config.guard_targets
        self._names = Names(shop.catalogue)
        objective.health = {RECALL: before[RECALL], **self._legality()}

    def guard(self) -> str | None:
        """Why to stop, or None: a weak reward destroys recall silently."""
        now, limit = self._shop.measure()[RECALL], self._shop.config.guard_drop
        self._objective.health = {RECALL: now, **self._legality()}
        if not self._guards or now >= self._before * (1 - limit):
            return None
        return f"held-out recall of the first code fell from {self._before:.4f} to {now:.4f}, by more than {limit:.0%}"

    @torch.no_grad()
    def _legality(self) -> dict[str, float]:
        """Share of unconstrained samples that name an item, for the newest requests."""
        shop = self._shop
        # Decoding wants the whole weights on each worker.
        if shards(shop.model, shop.config) or shop.model.items > 1 or not len(shop.contexts.trainable):
            return {}
        context = shop.contexts.of(shop.contexts.trainable[-LEGALITY_REQUESTS:])
        kv = shop.model.eval().encode(to_tensors(context, shop.catalogue, shop.device))
        generator = torch.Generator(shop.device).manual_seed(shop.config.seed)
        drawn = sample(shop.model, kv, None, LEGALITY_SAMPLES, generator=generator)
        return {"legality": float((self._names.rows(drawn.sids.cpu()) >= 0).mean())}


@contextmanager
def _rollouts(shop: Workshop[AlignConfig], job: AlignJob) -> Iterator[Rollouts | None]:
    """What roll-outs need, if the configuration has any; raises RewardMismatch."""
    if job.reward is None:
        yield None
        return
    reward = load_reward(job.reward / REWARD, shop.catalogue, str(shop.device))
    chosen = rolled_out(shop.data, shop.contexts, job.config)
    with closing(_sampler(shop, job.config)) as sampler:
        yield Rollouts(
            asked=Asked(count=len(chosen), of=lambda numbers: shop.contexts.of(chosen[numbers])),
            reward=rewarded(reward, shop.catalogue, job.config.worth),
            sampler=sampler,
            catalogue=shop.catalogue,
            items=shop.catalogue.to_tables()[1],
            now_ms=int(shop.data.times_ms.max(initial=0)),
        )


def _sampler(shop: Workshop[AlignConfig], config: AlignConfig) -> Sampler:
    """The configured roll-out server, or this process."""
    url, token = settings().rollout_url, settings().admin_token.get_secret_value()
    if not url:
        return InProcessSampler(
            shop.model, shop.catalogue, config.draw, every=config.push_every, precision=config.precision
        )
    every, patience_s = config.push_every, config.patience_s
    return ServerSampler(url, token, shop.catalogue, config.draw, every=every, patience_s=patience_s)


def rolled_out(data: RunData, contexts: Contexts, config: AlignConfig) -> np.ndarray:
    """int64: the requests, none of them held out, of the users whom a hash chooses; raises ValueError for none."""
    grouped = contexts.requests
    users = grouped.users.to_pylist()
    chosen = np.array([hashed(user, ROLLOUT_SEED) < config.users_share for user in users], bool)
    requests = contexts.trainable
    mine = chosen[grouped.user[requests]] & ~data.held_out[grouped.rows[grouped.offsets[requests]]]
    if not mine.any():
        raise ValueError(
            f"users_share {config.users_share} leaves no request to roll out of {len(users)} users and "
            f"{len(requests)} requests with features; raise align.users_share"
        )
    return requests[mine]


def told_of(shop: Workshop[AlignConfig], advantage: np.ndarray) -> Callable[[Example], Logged]:
    """Batches of the run's exposures with what they teach."""
    config = shop.config
    weights = shop.weights * kept_sessions(shop.data, shop.contexts, config.drop_sessions)
    logged = logged_log_probs(shop.data, shop.catalogue)
    if config.own_share is not None:
        own = shop.data.column("source") == OWN
        advantage = np.where(mixed(own, ~shop.data.held_out, config.own_share, config.seed), advantage, np.nan)

    def told(example: Example) -> Logged:
        return Logged(
            context=example.context,
            targets=example.targets,
            mask=example.mask,
            weights=shop.of_exposures(weights, example),
            advantages=shop.of_exposures(advantage, example),
            old_log_probs=shop.of_exposures(logged, example, padding=np.nan),
        )

    return told


def mixed(own: np.ndarray, select: np.ndarray, share: float, seed: int) -> np.ndarray:
    """bool [N]: as many of the exposures in ``select`` as there can be with ``share`` of them ``own``.

    The surplus of one side is left out at random. Where one side has none, a share between 0 and 1 leaves nothing of
    the other: raises ValueError then, and when nothing at all is left.
    """
    ours, theirs = np.flatnonzero(own & select), np.flatnonzero(~own & select)
    most_ours = share / (1 - share) * len(theirs) if share < 1 else np.inf
    most_theirs = (1 - share) / share * len(ours) if share > 0 else np.inf
    rng, kept = np.random.default_rng(seed), np.zeros(len(own), bool)
    for rows, most in ((ours, most_ours), (theirs, most_theirs)):
        kept[rng.permutation(rows)[: int(min(len(rows), round(min(most, len(rows)))))]] = True
    if not kept.any():
        raise ValueError(
            f"own_share {share} leaves nothing: there are {len(ours)} exposures of ours (source {OWN!r}) and "
            f"{len(theirs)} of others; set align.own_share to null to take them as they come"
        )
    return kept


def advantages(data: RunData, config: AlignConfig) -> DurationAdvantage:
    """Duration-aware advantage of every exposure that is not held out (0 there); tau is taken over all of them."""
    return duration_aware_advantage(
        data.column("play_ms"),
        data.column("duration_ms"),
        data.column("dislike"),
        data.column("user_id"),
        data.times_ms,
        batch=~data.held_out,
        config=DurationConfig(top_share=config.top_share),
    )


def kept_sessions(data: RunData, contexts: Contexts, drop: float) -> np.ndarray:
    """float32 [N]: 1 for exposures of the sessions left after dropping the share ``drop`` with the least play time."""
    grouped = contexts.requests
    sizes = np.diff(grouped.offsets)
    play = per_request(grouped, data.column("play_ms"))[contexts.trainable]
    worst = contexts.trainable[np.argsort(play, kind="stable")[: int(drop * len(play))]]
    keep = np.ones(len(grouped), np.float32)
    keep[worst] = 0
    weights = np.empty(len(data), np.float32)
    weights[grouped.rows] = np.repeat(keep, sizes)
    return weights


def logged_log_probs(data: RunData, catalogue: Catalogue) -> np.ndarray:
    """float32 [N, L] as logged by the server for our own exposures whose SID still names the item, NaN elsewhere."""
    levels = catalogue.levels
    logged = np.full((len(data), levels), np.nan, np.float32)
    rows = catalogue.rows(data.column("item_id"))
    lengths = (pc.list_value_length(data.exposures.column(name)) for name in ("sid", "log_probs"))
    complete = pc.and_(*(pc.equal(length, levels) for length in lengths))
    ours = pc.and_(pc.fill_null(complete, False), pc.equal(data.exposures.column("source"), "onerec"))
    ours = np.flatnonzero(ours.to_numpy() & (rows >= 0))

    def values(name: str) -> np.ndarray:
        lists = data.exposures.column(name).take(pa.array(ours)).combine_chunks()
        found: np.ndarray = lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, levels)
        return found

    same = (values("sid") == catalogue.sids[rows[ours]]).all(1)
    logged[ours[same]] = values("log_probs")[same]
    return logged
