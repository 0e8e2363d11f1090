"""A list written as a whole against five separate picks: diversity inside a session and stay time (O1, 2502.18965).

``python -m benchmarks.session [--quick] [--seeds N] [--output DIR]``. For every world the tokenizer, a session model
and two point-wise models (an encoder-decoder of the same size, and the lazy decoder) train on the same log for the same
number of steps at most. Then everybody who opens the app on the next day is shown one list of five by each arm, in
copies of the same world with the same luck, from the same past. Differences are paired by visitor, with bootstrap
intervals. Trainings and worlds that are done are kept in ``--output``: a killed benchmark goes on where it stopped.
The simulator's visitors get bored by poor videos, not by similar ones, so diversity earns nothing by itself here.
"""

import itertools
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import typer

from benchmarks.equal_loss import prepare, write_data
from benchmarks.harness import finish, kept, table
from benchmarks.trained import model_in, unpublished
from features.datasets import Dataset
from features.histories.context import Context
from features.histories.windows import Limits
from features.schema import EXPOSURE, FLAGS, conform
from features.world.simulator import Simulator, SimulatorConfig
from features.world.world import Visit
from models.bundle import Bundle
from models.presets import WEIGHTS
from models.serving.recommender import Recommender
from models.sizes import preset
from models.tokenizer.tokenizer import Tokenizer
from models.tokenizer.vocabulary import Catalogue
from models.training.data import Contexts, RunData
from models.training.pretrain import PretrainConfig, pretrain
from monitoring.experiment import bootstrap_mean

LIST = 5
BEAM = 32
ARMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "session": ("session-tiny", "session", {"epochs": 4}),
    "any session": ("session-tiny", "session", {"session_engagements": 0}),
    "picks": ("v1-tiny", "beam", {}),
    "picks of V2": ("tiny", "beam", {}),
}
"""Size, serving mode and training of each arm; "any session" also learns from sessions without a like or share. Of the
good ones there are few, and twelve times through them was learning them by heart (docs/log.md): four times here."""
LISTS = ("session", "any session")
MEASURES = {
    "stay_s": "seconds watched of the list, until the visitor leaves",
    "expected_stay_s": "mean over all luck, if the whole list is scrolled",
    "diversity": "mean of 1 - cosine over pairs of the list (centred sums of codebook vectors)",
    "tags": "distinct first tags in the list",
}


def train(arm: str, made: tuple[Path, Tokenizer, Catalogue], config: PretrainConfig, folder: Path) -> Bundle:
    """The arm's model after ``config.max_steps`` steps on the world's log."""
    data, tokenizer, catalogue = made
    size = replace(preset(ARMS[arm][0], catalogue.codes, catalogue.levels), dropout=0.1)
    print(f"training {arm}", file=sys.stderr)
    metrics = pretrain(data, catalogue, size, config, folder, code_vectors=tokenizer.codebooks, name=folder.name)
    return unpublished(model_in(folder, size).requires_grad_(False), tokenizer, catalogue, metrics)


def first_visits(world: Simulator) -> list[Visit]:
    """Everybody's first visit of day 0."""
    visits = {visit.user_id: visit for visit in reversed(world.visitors(0))}
    return sorted(visits.values(), key=lambda visit: visit.time_ms)


def contexts_of(visits: list[Visit], dataset: Dataset, catalogue: Catalogue, folder: Path) -> Context:
    """What training would see at these moments: each visit is added to the log as an exposure, to be asked about."""
    names = [f"visit-{n}" for n in range(len(visits))]
    asked = {
        "exposure_id": names,
        "request_id": names,
        "user_id": [visit.user_id for visit in visits],
        "item_id": [dataset.items["item_id"][0].as_py()] * len(visits),
        "position": [0] * len(visits),
        "event_time": [visit.time_ms for visit in visits],
        "source": ["organic"] * len(visits),
        "duration_ms": [0] * len(visits),
        "play_ms": [0] * len(visits),
        **{flag: [False] * len(visits) for flag in FLAGS},
    }
    log = pa.concat_tables([dataset.exposures, conform(pa.table(asked), EXPOSURE)])
    write_data(dataset, log, folder)
    contexts = Contexts(RunData.load(folder), catalogue, Limits())
    chosen = pc.index_in(pa.array(names), value_set=contexts.requests.names).to_numpy()
    return contexts.of(chosen)


def watched(world: Simulator, visits: list[Visit], lists: list[list[str]], vectors: np.ndarray, index: pa.Array) -> Any:
    """float64 [visits, measures]: what each visitor made of their list."""
    tags = dict(zip(*(world.history().items.column(name).to_pylist() for name in ("item_id", "tags")), strict=True))
    rows = []
    for visit, items in zip(visits, lists, strict=True):
        seen = world.watch(0, visit.user_id, items, visit.time_ms, 0)
        expected = world.expected_play_ms([visit.user_id], items, 0)
        own = vectors[pc.index_in(pa.array(items), value_set=index).to_numpy()]
        own = own / np.linalg.norm(own, axis=1, keepdims=True).clip(1e-9)
        distance = 1 - (own @ own.T)[np.triu_indices(len(own), 1)]
        kinds = {tags[item][0] if tags[item] else "" for item in items}
        rows.append([seen.play_ms.sum() / 1000, expected.sum() / 1000, distance.mean(), len(kinds)])
    return np.array(rows)


def play(seed: int, users: int, steps: int, folder: Path) -> dict[str, Any]:
    """All arms in the world of one seed: {arm: float [visits][measures]}."""
    config = SimulatorConfig(seed=seed, users=users, drift_day=None)
    world = Simulator(config)
    dataset, visits = world.history(), first_visits(world)
    made = prepare(dataset, folder, seed)
    fit = PretrainConfig(epochs=1000, batch_requests=32, max_steps=steps, warmup_steps=50, seed=seed, **WEIGHTS)
    context = contexts_of(visits, dataset, made[2], folder / "asked")
    vectors = made[1].quantizer.reconstruct(made[2].sids)
    vectors -= vectors.mean(0)  # what all items share says nothing about a pair
    arms, training = {}, {}
    for arm, (_, mode, changes) in ARMS.items():
        bundle = train(arm, made, replace(fit, **changes), folder / arm.replace(" ", "-"))
        answers = Recommender(bundle).recommend(context, num_items=LIST, beam_width=BEAM, mode=mode)
        lists = [answer.item_ids for answer in answers]
        found = watched(Simulator(config), visits, lists, vectors, pa.array(made[2].item_ids))
        arms[arm] = found.tolist()
        training[arm] = {name: bundle.metrics[name] for name in ("holdout/loss", "exposures_per_epoch", "examples")}
        print(seed, arm, dict(zip(MEASURES, found.mean(0).round(3), strict=True)), training[arm], file=sys.stderr)
    return {"arms": arms, "training": training}


def compare(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Means by arm, and the session model less each rival, paired by visitor over all worlds."""
    values = {arm: np.concatenate([np.array(record["arms"][arm]) for record in records]) for arm in ARMS}
    summary: dict[str, Any] = {"sessions": len(values["session"]), "arms": {}, "differences": {}}
    for arm, found in values.items():
        summary["arms"][arm] = dict(zip(MEASURES, found.mean(0).tolist(), strict=True))
    for lists, rival in itertools.product(LISTS, [arm for arm in ARMS if arm not in LISTS]):
        gaps = values[lists] - values[rival]
        intervals = {name: bootstrap_mean(gaps[:, column]) for column, name in enumerate(MEASURES)}
        summary["differences"][f"{lists} - {rival}"] = {
            name: {"mean": each.mean, "low": each.low, "high": each.high} for name, each in intervals.items()
        }
    return summary


def main(
    quick: Annotated[bool, typer.Option(help="one small world, few steps")] = False,
    seeds: Annotated[int, typer.Option(help="how many worlds")] = 3,
    users: Annotated[int, typer.Option(help="users of a world")] = 900,
    steps: Annotated[int, typer.Option(help="optimizer steps of every arm")] = 400,
    output: Annotated[Path | None, typer.Option(help="where runs are kept; default: a temporary folder")] = None,
) -> None:
    """Trains, plays and prints the record."""
    if quick:
        seeds, users, steps = 1, 300, 60
    folder = output or Path(tempfile.mkdtemp(prefix="onerec-session-"))
    records = []
    for seed in range(seeds):
        of = {"seed": seed, "users": users, "steps": steps, "arms": ARMS}
        records.append(kept(folder, f"seed{seed}", of, partial(play, seed, users, steps)))
    found = compare(records)
    table(
        f"one list of {LIST} for each of {found['sessions']} visitors",
        ["arm", *MEASURES],
        [(arm, *means.values()) for arm, means in found["arms"].items()],
    )
    rows = [
        (
            name,
            *(f"{each['mean']:+.3g} [{each['low']:.3g}, {each['high']:.3g}]" for each in gaps.values()),
        )
        for name, gaps in found["differences"].items()
    ]
    table("paired differences, 95 % bootstrap intervals", ["", *MEASURES], rows)
    training = [record["training"] for record in records]
    finish({"quick": quick, "seeds": seeds, "users": users, "steps": steps, **found, "training": training})


if __name__ == "__main__":
    typer.run(main)
