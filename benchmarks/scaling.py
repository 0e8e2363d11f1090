"""Does the loss fall steadily as the lazy decoder grows? Held-out loss against parameters and against compute.

``python -m benchmarks.scaling [--quick] [--output DIR]``. OneRec-V2 (arXiv 2508.20900) 2.4 fits
``L = 3.13 + 3660 / N^0.489`` from 0.1B to 8B. Here: sizes small enough for a CPU, one chronological pass over a
simulated log as V2 trains, learning rate by V2's law with a ceiling (below 2 M parameters the law's rate is too high),
the loss on all held-out exposures, FLOPs as torch's counter sees them. The same form is fitted and drawn beside the
paper's. Runs are kept in ``--output``: a killed benchmark goes on where it stopped. Left out: learning-rate
search per size, several sizes of data.
"""

import sys
import tempfile
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from plotly.subplots import make_subplots
from scipy.optimize import curve_fit
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.equal_loss import prepare
from benchmarks.harness import finish, kept, spread, table
from features.world.simulator import Simulator, SimulatorConfig
from models.architectures import model_of
from models.objectives.ntp import ntp_loss
from models.onerec_v2 import V2Config
from models.tokenizer.tokenizer import Tokenizer
from models.tokenizer.vocabulary import Catalogue
from models.training.data import Batches
from models.training.device import autocast
from models.training.optimizer import active_parameters, law
from models.training.pretrain import PretrainConfig, pretrain
from models.training.stage import Job, Workshop

SIZES = {32: 2, 64: 2, 128: 3, 256: 4}
"""Width: layers."""
PAPER = {0.1e9: 3.57, 0.2e9: 3.46, 0.5e9: 3.33, 1e9: 3.27, 2e9: 3.23, 4e9: 3.20, 8e9: 3.19}
PAPER_FIT = (3.13, 3660.0, 0.489)
RATE_CEILING = 4e-3
Made = tuple[Path, Tokenizer, Catalogue]
"""A run's data, and what names its items."""


def power_law(parameters: np.ndarray, floor: float, scale: float, exponent: float) -> np.ndarray:
    """``E + A / N^alpha``."""
    result: np.ndarray = floor + scale / parameters**exponent
    return result


def model_for(width: int, catalogue: Catalogue, embed: int) -> V2Config:
    """The member of the family with ``width``: head width 32, keys and values of their own for every layer."""
    return V2Config(
        codes=catalogue.codes,
        levels=catalogue.levels,
        d_model=width,
        layers=SIZES[width],
        heads=max(width // 32, 2),
        kv_groups=max(width // 32, 2),
        l_kv=SIZES[width],
        s_kv=2,
        embed=embed,
        head="tied",
        processor="direct",
    )


def run(width: int, seed: int, made: Made, output: Path, steps: int) -> dict[str, Any]:
    """One training; returns its record, from the disk when it is there."""
    data, tokenizer, catalogue = made
    model = model_for(width, catalogue, tokenizer.codebooks.shape[2])
    with torch.device("meta"):
        parameters = active_parameters(model_of(model))
    config = PretrainConfig(
        batch_requests=64,
        learning_rate=min(law(parameters), RATE_CEILING),
        weight_decay=0.0,
        max_steps=steps,
        seed=seed,
        checkpoint_every=100,
    )

    def work(folder: Path) -> dict[str, Any]:
        metrics = pretrain(data, catalogue, model, config, folder, code_vectors=tokenizer.codebooks, name=folder.name)
        job = Job(stage="judge", data=data, catalogue=catalogue, model=model, config=config, output=folder, init=folder)
        shop = Workshop(job)
        return {
            "width": width,
            "layers": SIZES[width],
            "seed": seed,
            "parameters": parameters,
            "loss": held_out_loss(shop),
            "loss_engaged": metrics["holdout/loss"],
            "flops": flops_of_a_step(shop) * metrics["step"],
            "steps": metrics["step"],
            "exposures": metrics["examples"],
            "seconds": metrics["seconds"],
        }

    of = {"made": data.parent.name, "model": asdict(model), "config": asdict(config)}
    return kept(output, f"d{width}-seed{seed}", of, work)


@torch.no_grad()
def held_out_loss(shop: Workshop[PretrainConfig]) -> float:
    """Mean over all held-out exposures and SID levels."""
    shop.model.eval()
    batches = Batches(shop.data, shop.contexts, shop.catalogue, shop.data.held_out, batch_requests=128)
    loss = count = 0.0
    for step in range(len(batches)):
        example = shop.example(batches(step))
        logits = shop.model(example.context, example.targets)
        loss += float(ntp_loss(logits, example.targets, example.mask.float())) * float(example.mask.sum())
        count += float(example.mask.sum())
    return loss / max(count, 1.0)


def flops_of_a_step(shop: Workshop[PretrainConfig], samples: int = 3) -> float:
    """Counted on steps spread over the log; contexts grow with it."""
    shop.model.train()
    batches, counter = shop.batches(), FlopCounterMode(display=False)
    for step in np.linspace(0, len(batches) - 1, samples).astype(int):
        example = shop.example(batches(int(step)))
        with counter, autocast("fp32", shop.device):
            logits = shop.model(example.context, example.targets)
            ntp_loss(logits, example.targets, example.mask.float()).backward()
    return float(counter.get_total_flops()) / samples


def fitted(records: list[dict[str, Any]]) -> tuple[float, float, float] | None:
    """(E, A, alpha) of all runs; None when no falling curve fits."""
    sizes = np.array([record["parameters"] for record in records], float)
    losses = np.array([record["loss"] for record in records], float)
    start = (losses.min() - 0.05, 1.0, 0.3)
    try:
        found, _ = curve_fit(power_law, sizes, losses, p0=start, bounds=([0, 0, 0.01], [10, 1e6, 2]), maxfev=20_000)
    except RuntimeError:
        return None
    return float(found[0]), float(found[1]), float(found[2])


def verdict(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean loss by size and whether each size beats the one before by more than twice the error of the difference."""
    by_size = {width: [r["loss"] for r in records if r["width"] == width] for width in SIZES}
    rows = [{"width": width, **spread(losses), "runs": len(losses)} for width, losses in by_size.items() if losses]
    pairs = list(pairwise(rows))
    falls = [before["mean"] - after["mean"] for before, after in pairs]
    errors = [((before["std"] ** 2 + after["std"] ** 2) / before["runs"]) ** 0.5 for before, after in pairs]
    clear = [fall > 2 * error for fall, error in zip(falls, errors, strict=True)]
    return {"sizes": rows, "falls": falls, "monotone": all(fall > 0 for fall in falls), "steady": all(clear)}


def plot(records: list[dict[str, Any]], fit: tuple[float, float, float] | None, path: Path) -> None:
    """Ours against parameters and compute, the paper's beside; one HTML file that needs no network."""
    titles = ("ours: loss and parameters", "ours: loss and compute", "OneRec-V2, Table 5")
    figure = make_subplots(rows=1, cols=3, subplot_titles=titles)
    sizes = np.array([record["parameters"] for record in records], float)
    hover = [f"d {record['width']}, seed {record['seed']}" for record in records]
    for column, key in ((1, "parameters"), (2, "flops")):
        x, y = [record[key] for record in records], [record["loss"] for record in records]
        figure.add_scatter(x=x, y=y, text=hover, mode="markers", name=f"runs by {key}", row=1, col=column)
    if fit:
        grid = np.geomspace(sizes.min(), sizes.max(), 100)
        name = f"{fit[0]:.3f} + {fit[1]:.3g} / N^{fit[2]:.3f}"
        figure.add_scatter(x=grid, y=power_law(grid, *fit), mode="lines", name=name, row=1, col=1)
    grid = np.geomspace(0.1e9, 8e9, 100)
    figure.add_scatter(x=list(PAPER), y=list(PAPER.values()), mode="markers", name="published", row=1, col=3)
    name = "3.13 + 3660 / N^0.489"
    figure.add_scatter(x=grid, y=power_law(grid, *PAPER_FIT), mode="lines", name=name, row=1, col=3)
    for column, title in ((1, "parameters"), (2, "training FLOPs"), (3, "parameters")):
        figure.update_xaxes(type="log", title=title, row=1, col=column)
    figure.update_yaxes(title="held-out loss, nats a level", row=1, col=1)
    figure.write_html(path, include_plotlyjs=True)


def main(
    quick: Annotated[bool, typer.Option(help="one seed, a small log, few steps")] = False,
    output: Annotated[Path | None, typer.Option(help="where runs are kept; default: a temporary folder")] = None,
    seeds: Annotated[int, typer.Option(help="how many seeds")] = 3,
    users: Annotated[int, typer.Option(help="users of the simulated log")] = 3000,
    only: Annotated[int, typer.Option(help="train this width alone; 0 = all")] = 0,
) -> None:
    """Trains every size with every seed, fits the law and draws it."""
    seeds, users, steps = (1, 400, 40) if quick else (seeds, users, 0)
    folder = output or Path(tempfile.mkdtemp(prefix="onerec-scaling-"))
    made = prepare(Simulator(SimulatorConfig(users=users, drift_day=None)).history(), folder)
    records = []
    for seed in range(seeds):
        for width in SIZES if not only else (only,):
            records.append(run(width, seed, made, folder, steps))
            last = records[-1]
            print(f"d {width}, seed {seed}: {last['loss']:.4f} after {last['seconds']:.0f} s", file=sys.stderr)
    fit, found = fitted(records) if len(records) > 3 else None, verdict(records)
    plot(records, fit, folder / "scaling.html")
    columns = ("width", "layers", "seed", "parameters", "flops", "steps", "exposures", "seconds", "loss")
    table("V2 by size, one pass over a simulated log", columns, [[r[name] for name in columns] for r in records])
    fit_record = dict(zip(("E", "A", "alpha"), fit, strict=True)) if fit else None
    runs = [{name: record[name] for name in columns} for record in records]
    finish(
        {
            **found,
            "fit": fit_record,
            "paper_fit": PAPER_FIT,
            "plot": str(folder / "scaling.html"),
            "runs": runs,
            "quick": quick,
        }
    )


if __name__ == "__main__":
    typer.run(main)
