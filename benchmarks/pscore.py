"""The P-Score reward model on real logs: its AUC by objective beside gradient boosting, and the search for its weights.

``python -m benchmarks.pscore --data KUAIRAND_FOLDER [--quick]``. The log is split by time: the first 80 % train, the
next 10 % choose the weights of the fused score and calibrate, the last 10 % test. The rival is scikit-learn's
HistGradientBoosting, one model an objective, on the same inputs: semantic ID, author and tag of the item, its record
just before the exposure, the user's attributes, and what the user did with all behaviours and with those of the same
tag, author and first code. The P-Score also attends to the single behaviours. Intervals draw whole users. The weights
(OneRec V1, arXiv 2506.13695, 2.4.1) come from a Pareto search, its path is drawn in ``--output``, where what is done
is kept: a killed benchmark goes on there. The bias towards long videos is measured on the log and in the simulator:
rank correlation of each reward with the video's duration.
"""

import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
import torch
import typer
from plotly.subplots import make_subplots
from scipy.stats import spearmanr
from sklearn.ensemble import HistGradientBoostingClassifier
from threadpoolctl import threadpool_limits

from benchmarks.equal_loss import write_data
from benchmarks.harness import finish, table
from features import datasets
from features.datasets import Dataset
from features.world.simulator import Simulator, SimulatorConfig, world_hash
from models.rewards.duration import duration_aware_advantage
from models.rewards.fusion import Step, chosen
from models.rewards.inputs import searches
from models.rewards.measures import FEWEST, Auc, auc_interval, calibration_error, platt, probability
from models.rewards.pscore import OBJECTIVES, PScore
from models.rewards.reward import sids_digest
from models.tokenizer.interactions import times
from models.tokenizer.tokenizer import Tokenizer, TokenizerConfig
from models.training.data import RunData
from models.training.fusion import FUSION_ROWS, refit, search
from models.training.judged import LONG_WATCH, Judged, Predictions, predict
from models.training.reward import RewardConfig, fit_pscore, fit_session

SHARES = (0.8, 0.9)
"""Where the log is cut, as shares of its exposures in order of time."""
ROUNDS = 24


def prepared(dataset: Dataset, folder: Path) -> tuple[Judged, np.ndarray, np.ndarray]:
    """The run's exposures, and which are for validation and for the test (bool [N])."""
    when = times(dataset.exposures)
    first, second = np.quantile(when, SHARES)
    past, tokens = dataset.exposures.filter(pa.array(when < first)), folder / "tokenizer.safetensors"
    if not tokens.exists():
        write_data(dataset, dataset.exposures, folder)
        Tokenizer.fit(dataset.items, past, TokenizerConfig(seed=0)).save(tokens)
    catalogue = Tokenizer.load(tokens).catalogue(dataset.items, past)
    data = RunData.load(folder)
    judged = Judged(data, catalogue, data.times_ms < first)
    return judged, (data.times_ms >= first) & (data.times_ms < second), data.times_ms >= second


def fitted(judged: Judged, config: RewardConfig, folder: Path) -> tuple[PScore, float]:
    """The trained P-Score and the seconds it took; goes on where a killed benchmark stopped."""
    made_of = {"config": asdict(config), "exposures": len(judged.data), "sids": sids_digest(judged.catalogue, 10**9)}
    model, metrics = fit_pscore(judged, config, folder, json.loads(json.dumps(made_of)))
    return model, float(metrics["seconds"])


def rival_inputs(judged: Judged, select: np.ndarray, config: RewardConfig) -> tuple[np.ndarray, np.ndarray]:
    """(inputs float32 [M, 73], rows [M]) of the exposures in ``select``: what P-Score's towers are given."""
    batches, rates = judged.batches(select, config, shuffle=False), torch.from_numpy(judged.rates[1:]).float()
    inputs, rows = [], []
    for step in range(len(batches)):
        example = judged.example(batches(step))
        items = example.items
        users = example.context.static[:, None].expand(-1, example.mask.shape[1], -1)
        names = torch.cat([items.sids, items.author[..., None], items.tag[..., None], users], -1).float()
        found = torch.cat([names, items.numbers, searches(example.context, items, rates)], -1)
        inputs.append(found[example.mask].numpy())
        rows.append(example.batch.exposures[example.batch.exposures >= 0])
    return np.concatenate(inputs), np.concatenate(rows)


def rival(judged: Judged, test: np.ndarray, config: RewardConfig, trees: int, file: Path) -> dict[str, Auc]:
    """AUC on the test exposures of one HistGradientBoosting an objective; kept in ``file`` as they are found."""
    known, known_rows = rival_inputs(judged, judged.train, config)
    asked, asked_rows = rival_inputs(judged, test, config)
    users = judged.data.sequences.events["user"][asked_rows]
    stored = json.loads(file.read_text()) if file.exists() else {}
    for x, name in enumerate(OBJECTIVES):
        if name in stored:
            continue
        wanted, truth = (judged.labels[rows, x] > LONG_WATCH for rows in (known_rows, asked_rows))
        scores = boosted(known, wanted, asked, trees) if FEWEST <= wanted.sum() <= len(wanted) - FEWEST else truth * 0.0
        stored[name] = asdict(auc_interval(truth, scores, users))
        file.write_text(json.dumps(stored))
    return {name: Auc(**stored[name]) for name in OBJECTIVES}


def boosted(known: np.ndarray, wanted: np.ndarray, asked: np.ndarray, trees: int) -> np.ndarray:
    """Scores of ``asked`` by gradient boosting on one core."""
    model = HistGradientBoostingClassifier(
        max_iter=trees, learning_rate=0.06, min_samples_leaf=40, l2_regularization=1.0, early_stopping=True,
        random_state=0,
    )  # fmt: skip
    with threadpool_limits(limits=1):
        scores: np.ndarray = model.fit(known, wanted).predict_proba(asked)[:, 1]
    return scores


def of_test(found: Predictions, validation: Predictions, theirs: dict[str, Auc]) -> list[dict[str, Any]]:
    """One row an objective: both AUCs with intervals, positives, and our calibration error on the test."""
    rows = []
    for x, name in enumerate(OBJECTIVES):
        ours = auc_interval(found.labels[:, x] > LONG_WATCH, found.logits[:, x], found.users)
        constants = platt(validation.logits[:, x], validation.labels[:, x])
        error = calibration_error(probability(found.logits[:, x], *constants), found.labels[:, x])
        row = {"objective": name, "positives": ours.positives, "auc": ours.value, "low": ours.low, "high": ours.high}
        row |= {"rival": theirs[name].value, "rival_low": theirs[name].low, "rival_high": theirs[name].high}
        rows.append({**row, "calibration_error": error})
    return rows


def durations(judged: Judged, found: Predictions, fused: np.ndarray) -> dict[str, float]:
    """Rank correlation of raw play time, of duration-aware rewards and of the P-Score with the video's duration."""
    data = judged.data
    play, duration = data.column("play_ms"), data.column("duration_ms")
    real = duration > 0
    users, dislike = data.column("user_id"), data.column("dislike")
    ours = duration_aware_advantage(play, duration, dislike, users, data.times_ms, batch=real)
    told = real & np.isfinite(ours.quantile)
    pairs = {
        "raw": (play[real], duration[real]),
        "advantage": (ours.advantage[told], duration[told]),
        "quantile": (ours.quantile[told], duration[told]),
        "watch_label": (judged.labels[real, 0], duration[real]),
        "p": (fused, duration[found.rows]),
    }
    return {name: float(spearmanr(*pair).statistic) for name, pair in pairs.items()}


def draw(path: list[Step], ceiling: np.ndarray, file: Path) -> None:
    """The search: AUC of ``p`` by objective, against its own tower's, and the weights, trial after trial."""
    figure = make_subplots(rows=2, cols=1, subplot_titles=("AUC of p less that of the own tower", "weight"))
    kept = [step for step in path if step.kept]
    for x, name in enumerate(OBJECTIVES):
        if not np.isfinite(ceiling[x]):
            continue
        gaps = [step.aucs[x] - ceiling[x] for step in kept]
        weights = [step.weights[x] for step in kept]
        figure.add_scatter(y=gaps, name=name, mode="lines+markers", row=1, col=1, legendgroup=name)
        figure.add_scatter(y=weights, name=name, showlegend=False, row=2, col=1, legendgroup=name)
    figure.update_yaxes(type="log", row=2, col=1)
    figure.update_xaxes(title="raises kept", row=2, col=1)
    figure.update_layout(template="plotly_white", height=800, title="Pareto search for the weights of the P-Score")
    figure.add_trace(go.Scatter(y=[0] * len(kept), mode="lines", line={"dash": "dot"}, name="own tower"), 1, 1)
    figure.write_html(file, include_plotlyjs=True)


def named(values: np.ndarray) -> dict[str, float | None]:
    """By objective; None where it cannot be told."""
    return {name: float(value) if np.isfinite(value) else None for name, value in zip(OBJECTIVES, values, strict=True)}


def simulated(folder: Path, config: RewardConfig, users: int) -> dict[str, Any]:
    """In the simulator's history: a P-Score's bias towards duration, and the AUCs of a session reward."""
    world = SimulatorConfig(users=users, drift_day=None)
    judged, _, test = prepared(Simulator(world).history(), folder / "simulator")
    model, _ = fitted(judged, replace(config, batch_requests=64), folder / "simulator-pscore")
    found = predict(model, judged, test, config)
    of_session = {"simulator": world_hash(world), "batch_requests": 64}
    _, sessions = fit_session(judged, replace(config, batch_requests=64), folder / "simulator-session", of_session)
    return {"world_hash": world_hash(world), **durations(judged, found, found.fused), "session": sessions["auc"]}


def searched(
    model: PScore, judged: Judged, middle: np.ndarray, config: RewardConfig, rounds: int
) -> tuple[list[Step], np.ndarray, Predictions]:
    """The search's path, the towers' own AUCs on the validation exposures, and what the final MLP learned from."""
    known, validation = (predict(model, judged, select, config) for select in (judged.newest(FUSION_ROWS), middle))
    fair = ((judged.rates > 0) & (judged.rates < 1)).astype(float)
    path, ceiling = search(model.fuse, known, validation, fair, rounds=rounds)
    return path, ceiling, known


def main(
    data: Annotated[Path, typer.Option(help="folder of a KuaiRand release or another log that onerec ingests")],
    quick: Annotated[bool, typer.Option(help="a fifth of the users, few trees, few trials")] = False,
    output: Annotated[Path | None, typer.Option(help="where plot and models go; default: a temporary folder")] = None,
) -> None:
    """Trains both on the past, compares them on the newest tenth, searches the weights."""
    torch.set_num_threads(1)
    folder = (output or Path(tempfile.mkdtemp(prefix="onerec-pscore-"))) / ("quick" if quick else "full")
    dataset = datasets.load(data)
    dataset = replace(dataset, exposures=sampled(dataset.exposures, 5)) if quick else dataset
    judged, middle, test = prepared(dataset, folder / "log")
    config = RewardConfig(epochs=1, batch_requests=256, max_steps=0, threads=1)
    model, seconds = fitted(judged, config, folder / "pscore")
    found, validation = (predict(model, judged, select, config) for select in (test, middle))
    print("fitting the rival", file=sys.stderr)
    theirs = rival(judged, test, config, 40 if quick else 150, folder / "rival.json")
    rows = of_test(found, validation, theirs)
    print("searching the weights", file=sys.stderr)
    path, ceiling, known = searched(model, judged, middle, config, 4 if quick else ROUNDS)
    draw(path, ceiling, folder / "pscore.html")
    fused = refit(model.fuse, known, chosen(path).weights)(torch.from_numpy(found.features)).squeeze(-1).numpy()
    for x, row in enumerate(rows):
        row["fused_auc"] = auc_interval(found.labels[:, x] > LONG_WATCH, fused, found.users, resamples=2).value
    columns = list(rows[0])
    table(f"P-Score on {dataset.name}, {len(found.rows)} test exposures", columns, [list(r.values()) for r in rows])
    bias = {
        "log": durations(judged, found, fused),
        "simulator": simulated(folder, config, 300 if quick else 900),
    }
    table(
        "rank correlation with the video's duration",
        ["where", "raw", "advantage", "quantile", "watch_label", "p"],
        [(k, *(v[n] for n in ("raw", "advantage", "quantile", "watch_label", "p"))) for k, v in bias.items()],
    )
    finish(record(judged, rows, path, ceiling, bias, seconds) | {"plot": str(folder / "pscore.html"), "quick": quick})


def record(
    judged: Judged, rows: list[dict[str, Any]], path: list[Step], ceiling: np.ndarray, bias: Any, seconds: float
) -> dict[str, Any]:
    """The JSON line."""
    by_name = {row["objective"]: {k: v if v == v else None for k, v in row.items()} for row in rows}
    watched = by_name["long_view"]
    steps = [
        {**asdict(step), "weights": named(step.weights), "aucs": named(step.aucs), "raised": _name(step)}
        for step in path
    ]
    return {
        "long_view_auc": watched["auc"],
        "long_view_auc_low": watched["low"],
        "long_view_auc_high": watched["high"],
        "rival_long_view_auc": watched["rival"],
        "rival_long_view_auc_low": watched["rival_low"],
        "rival_long_view_auc_high": watched["rival_high"],
        "long_view_positives": watched["positives"],
        "exposures": len(judged.data),
        "objectives": by_name,
        "weights": named(chosen(path).weights),
        "tower_auc_validation": named(ceiling),
        "search": steps,
        "duration_rho": bias["log"]["advantage"],
        "duration_rho_raw": bias["log"]["raw"],
        "duration": bias,
        "session_auc": bias["simulator"]["session"],
        "fit_seconds": seconds,
    }


def _name(step: Step) -> str | None:
    return OBJECTIVES[step.raised] if step.raised >= 0 else None


def sampled(exposures: pa.Table, every: int) -> pa.Table:
    """The exposures of one user in ``every``."""
    users = np.asarray(exposures.column("user_id").to_pylist(), str)
    _, user = np.unique(users, return_inverse=True)
    return exposures.filter(pa.array(user % every == 0))


if __name__ == "__main__":
    typer.run(main)
