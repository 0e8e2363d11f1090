"""Does reinforcement learning on a real log help? Pre-trained, RSFT, and RSFT with a policy objective, side by side.

``python -m benchmarks.quality_rl --data KuaiRand-Pure --since 2022-05-05``. Tokenizer, pre-training and every arm of
alignment are the platform's own stages and learn from what lies before the date. Judged are people who come since then,
at their first request: by Recall@10 of the videos they went on to watch long (new ones to them), and by a user model
fitted on the whole log, which no policy sees, as stay time over a list of ten. Differences are paired by user, with
bootstrap intervals. Arms start from the same weights and make as many steps; ``longer`` is pre-training going on, so
that steps alone explain nothing. Left out: tuning the arms, which would need a second hold-out.
"""

import copy
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import typer

from benchmarks.equal_loss import write_data
from benchmarks.harness import command, finish, hardware, kept, spread, table
from benchmarks.quality import date_of
from benchmarks.trained import model_in, unpublished
from features import datasets
from features.datasets import Dataset
from features.histories.context import Context
from features.histories.windows import Limits
from features.world.usermodel import UserModel, UserModelConfig
from models.baselines import Popularity
from models.bundle import Bundle
from models.evaluation import accuracy
from models.presets import WEIGHTS, recipe
from models.serving.recommender import Recommender
from models.tokenizer.interactions import times
from models.tokenizer.tokenizer import Tokenizer
from models.tokenizer.vocabulary import Catalogue
from models.training.align import align
from models.training.alignment import AlignConfig
from models.training.data import Contexts, RunData
from models.training.pretrain import PretrainConfig, pretrain
from models.training.reward import train_reward
from monitoring.experiment import bootstrap_mean

LIST, BEAM, LISTED = 10, 64, 50
_ROLLOUTS: dict[str, Any] = {
    "objective": "ecpo",
    "signal": "rollouts",
    "users_share": 0.2,
    "group": 16,
    "push_every": 10,
}
_BEAMS: dict[str, Any] = {**_ROLLOUTS, "search": "beam", "rollout_requests": 24, "learning_rate": 2e-4}
ARMS: dict[str, dict[str, Any]] = {
    "longer": {},
    "rsft": {"objective": "rsft"},
    "rsft + gbpo": {"objective": "gbpo"},
    "rsft + ecpo": {**_ROLLOUTS},
    "rsft + ecpo of beams": _BEAMS,
    "rsft + ecpo of beams, for stay": {**_BEAMS, "worth": "stay"},
}
"""What each changes in alignment as configured; ``longer`` is none. Beams, more requests a step and the lower rate are
what worked best in the simulator (docs/log.md), not here. ``for stay`` is rewarded with predicted seconds of watching,
the others with the P-Score."""
BASE = "pretrained"
MEASURES = {
    "recall@10": "share of the long views since the date that stand among the ten",
    "ndcg@10": "the same, by place",
    "stay_s": "seconds that the user model's person stays with the ten",
    "expected_stay_s": "mean over all luck, if all ten are scrolled through",
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is trained and judged."""

    steps: int = 1000
    align_steps: int = 200
    reward_steps: int = 400
    requests: int = 256
    """Of a step."""
    people: int = 2500
    codes: int = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """B people at their first request since the date."""

    context: Context
    users: list[str]
    times_ms: np.ndarray
    seen: list[set[str]]
    relevant: list[set[str]]
    """Long views from the request on of what was not seen before."""


def shown(dataset: Dataset) -> tuple[Dataset, UserModel]:
    """The log with the videos that it shows at all, and the user model fitted on the whole of it."""
    people = len(set(dataset.exposures.column("user_id").to_pylist()))
    world = UserModel.fit(dataset, UserModelConfig(users=people, drift_day=None, new_items_per_day=0))
    return world.history(), world


def asked(dataset: Dataset, since_ms: int, catalogue: Catalogue, folder: Path, people: int) -> Asked:
    """A sample of ``people`` with something to find; raises ValueError when nobody has."""
    write_data(dataset, dataset.exposures, folder)
    data = RunData.load(folder)
    contexts, items = Contexts(data, catalogue, Limits()), data.column("item_id")
    requests, long_view = contexts.requests, data.column("long_view") & ~data.column("dislike")
    late = np.flatnonzero(requests.times_ms >= since_ms)
    first = late[np.unique(requests.user[late], return_index=True)[1]]
    events = data.sequences.events
    chosen: list[int] = []
    seen: list[set[str]] = []
    relevant: list[set[str]] = []
    for request in np.random.default_rng(0).permutation(first):
        start, end = np.searchsorted(events["user"], requests.user[request] + np.array([0, 1]))
        now = start + np.searchsorted(events["time_ms"][start:end], requests.times_ms[request])
        known = set(items[start:now])
        wanted = set(items[now:end][long_view[now:end]]) - known
        if wanted and len(chosen) < people:
            chosen.append(request)
            seen.append(known)
            relevant.append(wanted)
    if not chosen:
        raise ValueError("nobody has a long view of something new since the date; choose an earlier one")
    rows = np.array(chosen)
    users = requests.user_ids[rows].tolist()
    return Asked(context=contexts.of(rows), users=users, times_ms=requests.times_ms[rows], seen=seen, relevant=relevant)


def judge(lists: list[list[str]], people: Asked, world: UserModel) -> np.ndarray:
    """float64 [B, measures] of the best ``LIST`` of each list."""
    scores = accuracy(lists, people.relevant)
    world = copy.deepcopy(world)  # people remember and tire; every arm meets them fresh
    stays = []
    for user, time_ms, ranking in zip(people.users, people.times_ms, lists, strict=True):
        top = ranking[:LIST]
        watched = world.watch(0, user, top, int(time_ms), 0)
        stays.append((watched.play_ms.sum() / 1000, world.expected_play_ms([user], top, 0).sum() / 1000))
    return np.column_stack([scores["recall@10"], scores["ndcg@10"], np.array(stays)])


def ranked(bundle: Bundle, people: Asked) -> list[list[str]]:
    """What the recommender would answer."""
    answers = Recommender(bundle).recommend(people.context, num_items=LISTED, beam_width=BEAM, exclude=people.seen)
    return [answer.item_ids for answer in answers]


def play(dataset: Dataset, since_ms: int, seed: int, size: Size, folder: Path) -> dict[str, Any]:
    """All arms of one seed: {arm: float [people][measures]}, and how each was trained."""
    dataset, world = shown(dataset)
    past = dataset.exposures.filter(pa.array(times(dataset.exposures) < since_ms))
    data = folder / "data"
    write_data(dataset, past, data)
    chosen = recipe("tiny")
    config = replace(chosen.tokenizer, codes=min(size.codes, dataset.items.num_rows // 4), seed=seed)
    tokenizer = Tokenizer.fit(dataset.items, past, config)
    catalogue = tokenizer.catalogue(dataset.items, past)
    people = asked(dataset, since_ms, catalogue, folder / "asked", size.people)
    model, first = chosen.model_for(catalogue), folder / BASE
    base = PretrainConfig(epochs=50, batch_requests=size.requests, max_steps=size.steps, seed=seed, **WEIGHTS)
    training = {BASE: _timed(partial(pretrain, data, catalogue, model, base, first, code_vectors=tokenizer.codebooks))}
    print(f"seed {seed}: {len(people.users)} people, {past.num_rows} exposures before", file=sys.stderr)
    floor = Popularity.fit(past, dataset.items, now_ms=since_ms).recommend(
        people.users, since_ms, LISTED, exclude=people.seen
    )
    arms = {"popularity": judge([[item for item, _ in each] for each in floor], people, world).tolist()}
    judge_of = replace(chosen.reward, batch_requests=size.requests, epochs=50, max_steps=size.reward_steps, seed=seed)
    training["reward"] = _timed(partial(train_reward, data, catalogue, judge_of, folder / "reward"))
    policy = AlignConfig(epochs=50, batch_requests=size.requests, max_steps=size.align_steps, seed=seed, **WEIGHTS)
    for arm in (BASE, *ARMS):
        if arm != BASE:
            training[arm] = _timed(partial(_aligned, arm, data, catalogue, model, policy, first, folder / arm))
        found = judge(ranked(unpublished(model_in(folder / arm, model), tokenizer, catalogue), people), people, world)
        arms[arm] = found.tolist()
        print(f"  {arm}: {dict(zip(MEASURES, found.mean(0).round(4).tolist(), strict=True))}", file=sys.stderr)
    return {"arms": arms, "training": training, "people": len(people.users), "exposures": past.num_rows}


def _aligned(
    arm: str, data: Path, catalogue: Catalogue, model: Any, config: AlignConfig, init: Path, output: Path
) -> dict[str, Any]:
    if ARMS[arm]:
        reward = output.with_name("reward")
        return align(data, catalogue, replace(config, **ARMS[arm]), output, init=init, reward=reward)
    same = {name: getattr(config, name) for name in ("epochs", "batch_requests", "max_steps", "learning_rate", "seed")}
    return pretrain(data, catalogue, model, PretrainConfig(**same, **WEIGHTS), output, init=init)


def _timed(work: Any) -> dict[str, Any]:
    start = time.perf_counter()
    metrics = work()
    names = (
        "loss",
        "step",
        "stopped",
        "holdout/loss",
        "holdout/recall_level1",
        "ntp",
        "gbpo",
        "ecpo",
        "policy/kl",
        "reward/auc",
    )
    return {name: metrics[name] for name in names if name in metrics} | {"seconds": time.perf_counter() - start}


def compare(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Means by arm, and each arm less the pre-trained and less ``longer``, people's values averaged over the seeds."""
    values = {arm: np.mean([record["arms"][arm] for record in records], 0) for arm in records[0]["arms"]}
    summary: dict[str, Any] = {"people": len(values[BASE]), "arms": {}, "differences": {}}
    for arm, found in values.items():
        own = [np.mean(record["arms"][arm], 0) for record in records]
        summary["arms"][arm] = {
            name: {"mean": float(found[:, k].mean()), "std": spread(each[k] for each in own)["std"]}
            for k, name in enumerate(MEASURES)
        }
    for arm, rival in [(arm, BASE) for arm in ARMS] + [(arm, "longer") for arm in ARMS if arm != "longer"]:
        gaps = values[arm] - values[rival]
        intervals = {name: bootstrap_mean(gaps[:, k]) for k, name in enumerate(MEASURES)}
        summary["differences"][f"{arm} - {rival}"] = {name: asdict(each) for name, each in intervals.items()}
    return summary


def verdict(differences: dict[str, dict[str, dict[str, float]]]) -> dict[str, str]:
    """By arm over pre-training: better or worse where the interval leaves 0 out, else no difference seen."""

    def word(gap: dict[str, float]) -> str:
        return "better" if gap["low"] > 0 else "worse" if gap["high"] < 0 else "no difference seen"

    return {pair: ", ".join(f"{name} {word(gap)}" for name, gap in gaps.items()) for pair, gaps in differences.items()}


def main(
    data: Annotated[Path, typer.Option(help="a log with play times, such as KuaiRand-Pure")],
    since: Annotated[str, typer.Option(help="YYYY-MM-DD: learned from before, judged from there on")] = "2022-05-05",
    seeds: Annotated[int, typer.Option(min=1, help="how many seeds")] = 1,
    output: Annotated[Path | None, typer.Option(help="where runs are kept; default: a temporary folder")] = None,
    quick: Annotated[bool, typer.Option(help="one seed, few steps and people")] = False,
) -> None:
    """Trains, judges and prints the record."""
    date = date_of(since)
    if date is None:
        raise typer.BadParameter("give --since YYYY-MM-DD: what is learned from must lie before what is judged")
    seeds, size = (1, Size(steps=40, align_steps=10, reward_steps=20, people=200)) if quick else (seeds, Size())
    folder = output or Path(tempfile.mkdtemp(prefix="onerec-quality-rl-"))
    datasets.check(data, played=True)
    dataset = datasets.load(data)
    records = []
    for seed in range(seeds):
        of = {"data": dataset.name, "since": since, "seed": seed, "size": asdict(size), "arms": ARMS}
        records.append(kept(folder, f"seed{seed}", of, partial(play, dataset, date, seed, size)))
    report(records, {"data": dataset.name, "since": since, "seeds": seeds, "quick": quick})


def report(records: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """The tables and the last line."""
    found = compare(records)
    table(
        f"{found['people']} people since {about['since']}",
        ["arm", *MEASURES],
        [(arm, *(each["mean"] for each in means.values())) for arm, means in found["arms"].items()],
    )
    rows = [
        (name, *(f"{each['mean']:+.3g} [{each['low']:.3g}, {each['high']:.3g}]" for each in gaps.values()))
        for name, gaps in found["differences"].items()
    ]
    table("paired differences, 95 % bootstrap intervals", ["", *MEASURES], rows)
    training = [record["training"] for record in records]
    seconds = [sum(arm["seconds"] for arm in each.values()) for each in training]
    finish(
        {"command": command(), "hardware": hardware(), **about, **found, "verdict": verdict(found["differences"])}
        | {"training": training, "seconds": round(max(seconds), 1)}
    )


if __name__ == "__main__":
    typer.run(main)
