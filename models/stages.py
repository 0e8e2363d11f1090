"""The stages of a pipeline run: what the Kubeflow components call, one function a component.

Each reads its inputs from the run's folder in object storage, does its work through the library below and stores the
outcome under ``runs/<run_id>/<stage>/`` (``features.runs``): idempotent by content digest, resumable by run id. With a
``base`` version a stage continues from that bundle: codebooks stay frozen and new items are appended, weights go on.
"""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features import catalog
from features.histories.clusters import ItemVectors
from features.histories.windows import Limits
from features.runs import Run
from features.settings import settings
from features.storage import Storage, connect
from models import bundle
from models.baselines import ItemKNN, Popularity
from models.bundle import Bundle
from models.deltas import catch_up
from models.evaluation import CUTOFFS, card, evaluate
from models.onerec_session import SessionConfig
from models.presets import Recipe, recipe
from models.rewards.reward import REWARD
from models.serving.recommender import Recommender
from models.tokenizer.interactions import popularity
from models.tokenizer.refit import appended_drift
from models.tokenizer.tokenizer import Tokenizer
from models.training.align import align
from models.training.data import RunData
from models.training.pretrain import pretrain
from models.training.reward import require, train_reward
from models.training.tokenizer import CARD, fit_tokenizer, read_tokens, write_card, write_tokens

PER_LEVEL = (
    "utilisation",
    "dead_codes",
    "entropy_nats",
    "perplexity",
    "gini",
    "largest_cluster",
    "mse_share_of_variance",
    "js",
    "js_noise",
    "psi",
)
"""What a tokenizer's quality report gives as one number a level."""


class NotBlessed(RuntimeError):
    """A candidate without a blessing was to be published."""


def tokenize_run(
    run_id: str, *, data: str, preset: str, overrides: str, base: str
) -> tuple[str, dict[str, float], str]:
    """Stage ``tokenizer``: tokenizer.safetensors, sids.parquet, items.parquet, card.html and metrics.json.

    Returns the digest, the quality's scalars and the card.
    """
    chosen = recipe(preset, overrides)

    def work(source: Path, folder: Path) -> dict[str, Any]:
        if base:
            return _append(base, source / "data", folder)
        address, name = settings().ray_address, f"{run_id}-tokenizer"
        return fit_tokenizer(source / "data", chosen.tokenizer, folder, ray_address=address, name=name)

    inputs = {"data": data, "recipe": asdict(chosen.tokenizer), "base": base}
    digest = _stage(run_id, "tokenizer", inputs, ["data"], work, resumes=True)
    run = Run(connect(), run_id)
    page = run.storage.get(f"{run.prefix('tokenizer')}/{CARD}").decode()
    return digest, scalars(run.summary("tokenizer")), page


def _append(base: str, data: Path, folder: Path) -> dict[str, Any]:
    """New items beside the old: the bundle's tokenizer as it is, its SID table longer."""
    exposures, items = (pq.read_table(data / f"{name}.parquet") for name in ("exposures", "items"))
    old = _bundle(base)
    catalogue = old.tokenizer.append(old.catalogue, items)
    catalogue = catalogue.with_popularity(popularity(exposures, catalogue.item_ids))
    write_tokens(folder, old.tokenizer, catalogue)
    drift = appended_drift(old.catalogue, catalogue)
    quality = write_card(folder, old.tokenizer.quality(catalogue, items, exposures) | drift)
    (folder / "metrics.json").write_text(json.dumps(quality, indent=1))
    return quality


def scalars(quality: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in a quality report by name; what has one number a level gets /level1, /level2, ..."""
    found: dict[str, float] = {}
    for name, value in quality.items():
        if isinstance(value, dict):
            found |= scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list) and name in PER_LEVEL:
            found |= {f"{prefix}{name}/level{level + 1}": float(number) for level, number in enumerate(value)}
        elif isinstance(value, int | float):
            found[prefix + name] = float(value)
    return found


def pretrain_run(run_id: str, *, tokens: str, preset: str, overrides: str, base: str) -> str:
    """Stage ``pretrain``: model.safetensors, config.json and the metrics of every step."""
    chosen = recipe(preset, overrides)
    config = chosen.incremental if base else chosen.pretrain

    def work(source: Path, folder: Path) -> dict[str, Any]:
        catalogue = read_tokens(source / "tokenizer")
        model = chosen.model_for(catalogue)
        return pretrain(
            source / "data",
            catalogue,
            model,
            config,
            folder,
            init=_bundle_folder(base) if base else None,
            code_vectors=None if base else Tokenizer.load(source / "tokenizer" / "tokenizer.safetensors").codebooks,
            ray_address=settings().ray_address,
            workers=settings().ray_workers,
            name=f"{run_id}-pretrain",
            store=f"checkpoints/{run_id}/pretrain",
        )

    inputs = {"tokens": tokens, "config": asdict(config), "preset": preset, "dropout": chosen.dropout, "base": base}
    return _stage(run_id, "pretrain", inputs, ["data", "tokenizer"], work, resumes=True)


def align_run(run_id: str, *, pretrained: str, preset: str, overrides: str) -> str:
    """Stages ``reward``, whose AUC must pass RL's gate, and ``align``: RSFT and GBPO from the pre-trained weights.

    Raises RewardTooWeak.
    """
    chosen = recipe(preset, overrides)
    reward = _reward(run_id, chosen)
    if chosen.align.gbpo_weight:
        require(Run(connect(), run_id).summary("reward"), chosen.reward)

    def work(source: Path, folder: Path) -> dict[str, Any]:
        return align(
            source / "data",
            read_tokens(source / "tokenizer"),
            chosen.align,
            folder,
            init=source / "pretrain",
            ray_address=settings().ray_address,
            workers=settings().ray_workers,
            name=f"{run_id}-align",
            store=f"checkpoints/{run_id}/align",
        )

    inputs = {"pretrained": pretrained, "config": asdict(chosen.align), "reward": reward}
    return _stage(run_id, "align", inputs, ["data", "tokenizer", "pretrain"], work, resumes=True)


def _reward(run_id: str, chosen: Recipe) -> str:
    """Stage ``reward``: reward.safetensors; returns its digest."""
    record = Run(connect(), run_id).done("tokenizer")
    assert record is not None, "alignment comes after the tokenizer"

    def work(source: Path, folder: Path) -> dict[str, Any]:
        catalogue = read_tokens(source / "tokenizer")
        config = replace(chosen.reward, sessions=isinstance(chosen.model_for(catalogue), SessionConfig))
        address, name = settings().ray_address, f"{run_id}-reward"
        return train_reward(source / "data", catalogue, config, folder, ray_address=address, name=name)

    inputs = {"tokens": record["digest"], "preset": chosen.preset, "config": asdict(chosen.reward)}
    return _stage(run_id, "reward", inputs, ["data", "tokenizer"], work, resumes=True)


def evaluate_run(run_id: str, *, aligned: str, base: str) -> tuple[dict[str, float], str]:
    """Stage ``evaluate``: the candidate's bundle folder, its metrics; returns (metrics of the candidate, HTML card)."""

    def work(source: Path, folder: Path) -> dict[str, Any]:
        candidate = assemble(source, folder / "bundle")
        production = _bundle(base) if base else None
        result = judge(RunData.load(source / "data"), candidate, production)
        result["training"] = {stage: _metrics(source / stage) for stage in ("tokenizer", "pretrain", "reward", "align")}
        (folder / "bundle" / "metrics.json").write_text(json.dumps(result, indent=1, default=str))
        (folder / "card.html").write_text(card(result), encoding="utf-8")
        return result

    stages = ["data", "tokenizer", "pretrain", "reward", "align"]
    _stage(run_id, "evaluate", {"aligned": aligned, "base": base}, stages, work)
    run = Run(connect(), run_id)
    summary = run.summary("evaluate")
    return summary["candidate"], run.storage.get(f"{run.prefix('evaluate')}/card.html").decode()


def assemble(source: Path, folder: Path) -> Bundle:
    """Puts the outcome of the training stages together as a bundle folder and loads it from there."""
    folder.mkdir(parents=True)
    trained = json.loads((source / "align" / "config.json").read_text())
    config = {"architecture": trained["architecture"], "model": trained["model"], "limits": asdict(Limits())}
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    (folder / "model.safetensors").write_bytes((source / "align" / "model.safetensors").read_bytes())
    for name in ("tokenizer.safetensors", "sids.parquet", "items.parquet"):
        (folder / name).write_bytes((source / "tokenizer" / name).read_bytes())
    (folder / REWARD).write_bytes((source / "reward" / REWARD).read_bytes())
    (folder / "metrics.json").write_text("{}")
    return Bundle.load(folder)


def judge(data: RunData, candidate: Bundle, production: Bundle | None) -> dict[str, Any]:
    """Evaluates on the requests held out from training; baselines learn from what the candidate may."""
    holdout = data.holdout(candidate.catalogue)
    known = data.exposures.filter(pa.array(~data.held_out))
    counts = Counter(data.before_newest_day()["item_id"].to_pylist())
    now_ms = int(holdout.times_ms.max()) if len(holdout) else 0
    rivals = (
        ("popularity", Popularity.fit(known, data.items, now_ms=now_ms)),
        ("itemknn", ItemKNN.fit(known, data.items, now_ms=now_ms)),
    )
    baselines = {
        name: [
            [item for item, _ in ranked]
            for ranked in rival.recommend(holdout.user_ids, now_ms, max(CUTOFFS), exclude=holdout.seen)
        ]
        for name, rival in rivals
    }
    if production is None:
        return evaluate(Recommender(candidate), None, baselines, holdout, None, counts)
    theirs = data.holdout(production.catalogue)
    return evaluate(Recommender(candidate), Recommender(production), baselines, holdout, theirs, counts)


def publish_run(run_id: str, *, alias: str, base: str) -> str:
    """Stage ``publish``: uploads the evaluated bundle, swaps ``alias``; raises NotBlessed without a blessing."""
    storage = connect()
    run = Run(storage, run_id)
    decision = storage.get_json(f"runs/{run_id}/gate/decision.json")
    if not decision["blessed"]:
        raise NotBlessed(f"run {run_id} was not blessed ({'; '.join(decision['failed'])}); it is not published")
    record = run.done("data")
    assert record is not None, "a blessed run has data"
    evaluated = run.done("evaluate")
    assert evaluated is not None, "a blessed run was evaluated"

    def work(source: Path, folder: Path) -> dict[str, Any]:
        version = bundle.publish(
            storage,
            source / "evaluate" / "bundle",
            data_time=datetime.fromisoformat(record["inputs"]["end"]),
            parents=[base] if base else [],
            lineage={"run_id": run_id, "data": record["digest"], "window": record["inputs"]},
        )
        (folder / "version.txt").write_text(version)
        write_vectors(storage, source / "evaluate" / "bundle", version)
        return {"version": version}

    _stage(run_id, "publish", {"evaluated": evaluated["digest"], "alias": alias}, ["evaluate"], work)
    version = str(run.summary("publish")["version"])
    cache = settings().home / "bundles"
    catch_up(storage, version, cache)
    bundle.set_alias(storage, alias, version)
    # Whoever added items meanwhile saw the old version behind the alias.
    catch_up(storage, version, cache)
    print(f"published {version} as {alias}")
    return version


def write_vectors(storage: Storage, folder: Path, version: str) -> None:
    """Stores the sums of the codes of every item: what clustering a user's past compares items by."""
    catalogue, tokenizer = read_tokens(folder), Tokenizer.load(folder / "tokenizer.safetensors")
    sums = tokenizer.quantizer.reconstruct(catalogue.sids)
    names = np.array(catalogue.item_ids, object)
    catalog.write_vectors(storage, ItemVectors(item_ids=names, vectors=sums, version=version))


def _stage(
    run_id: str,
    stage: str,
    inputs: dict[str, Any],
    needs: list[str],
    work: Callable[[Path, Path], dict[str, Any]],
    resumes: bool = False,
) -> str:
    """Runs ``work(folder holding the stages of ``needs``, output folder)`` unless it is done with these inputs.

    ``resumes`` keeps the output folder when the work is killed: training goes on from its checkpoint there.
    """
    run = Run(connect(), run_id)

    def fetch_and_work(folder: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix=f"onerec-{stage}-in-") as scratch:
            for need in needs:
                run.fetch(need, Path(scratch))
            return work(Path(scratch), folder)

    return run.stage(stage, inputs, fetch_and_work, keep=settings().home / "work" if resumes else None)


def _bundle_folder(version: str) -> Path:
    return bundle.fetch(connect(), version, settings().home / "bundles")


def _bundle(version: str) -> Bundle:
    return Bundle.load(_bundle_folder(version))


def _metrics(folder: Path) -> dict[str, Any]:
    path = folder / "metrics.json"
    metrics: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return metrics


def run(stage: str, arguments: dict[str, str]) -> str:
    """A training stage by its name, as a pod or a RayJob runs it; returns its digest."""
    stages: dict[str, Callable[..., str]] = {"pretrain": pretrain_run, "align": align_run}
    if stage not in stages:
        raise ValueError(f"stage {stage!r} is unknown; give one of {', '.join(stages)}")
    return stages[stage](**arguments)


if __name__ == "__main__":  # what a RayJob runs on its head: python -m models.stages STAGE '{"run_id": ...}'
    print(run(sys.argv[1], json.loads(sys.argv[2])))
