"""The stages that train: what the Kubeflow components call, one function a component (``models.release`` has the rest).

Each reads its inputs from the run's folder in object storage, does its work through the library below and stores the
outcome under ``runs/<run_id>/<stage>/`` (``features.runs``): idempotent by content digest, resumable by run id. With a
``base`` version a stage continues from that bundle: codebooks stay frozen and new items are appended, weights go on.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from features.runs import Run
from features.settings import settings
from features.storage import connect
from models.onerec_session import SessionConfig
from models.presets import Recipe, recipe
from models.staging import bundle_folder, open_bundle, staged
from models.tokenizer.interactions import popularity
from models.tokenizer.refit import appended_drift, refit
from models.tokenizer.tokenizer import Tokenizer
from models.training.align import align
from models.training.pretrain import pretrain
from models.training.reward import require, train_reward
from models.training.tokenizer import CARD, TOKENIZER, fit_tokenizer, read_tokens, write_card, write_tokens

MAPPING = "sid_mapping.parquet"
"""Of a run with new codebooks: item_id, old_sid, new_sid."""
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
    "codes",
)
"""What a tokenizer's quality report gives as one number a level."""


def tokenize_run(
    run_id: str, *, data: str, preset: str, overrides: str, base: str, replaces: str = ""
) -> tuple[str, dict[str, float], str]:
    """Stage ``tokenizer``: tokenizer.safetensors, sids.parquet, items.parquet, card.html and metrics.json.

    With ``replaces`` new codebooks keep that bundle's names of codes as far as they can (``models.tokenizer.refit``),
    and sid_mapping.parquet says what its SIDs became. Returns the digest, the quality's scalars and the card.
    """
    chosen = recipe(preset, overrides)

    def work(source: Path, folder: Path) -> dict[str, Any]:
        if base:
            return _append(base, source / "data", folder)
        address, name = settings().ray_address, f"{run_id}-tokenizer"
        quality = fit_tokenizer(source / "data", chosen.tokenizer, folder, ray_address=address, name=name)
        return {**quality, **_renumber(replaces, folder)} if replaces else quality

    inputs = {"data": data, "recipe": asdict(chosen.tokenizer), "base": base, "replaces": replaces}
    digest = staged(run_id, "tokenizer", inputs, ["data"], work, resumes=True)
    run = Run(connect(), run_id)
    page = run.storage.get(f"{run.prefix('tokenizer')}/{CARD}").decode()
    return digest, scalars(run.summary("tokenizer")), page


def _append(base: str, data: Path, folder: Path) -> dict[str, Any]:
    """New items beside the old: the bundle's tokenizer as it is, its SID table longer."""
    exposures, items = (pq.read_table(data / f"{name}.parquet") for name in ("exposures", "items"))
    old = open_bundle(base)
    catalogue = old.tokenizer.append(old.catalogue, items)
    catalogue = catalogue.with_popularity(popularity(exposures, catalogue.item_ids))
    write_tokens(folder, old.tokenizer, catalogue)
    drift = appended_drift(old.catalogue, catalogue)
    quality = write_card(folder, old.tokenizer.quality(catalogue, items, exposures) | drift)
    (folder / "metrics.json").write_text(json.dumps(quality, indent=1))
    return quality


def _renumber(replaces: str, folder: Path) -> dict[str, Any]:
    """The fitted codebooks and SIDs in ``folder`` under the old bundle's names of codes; what is kept of them.

    Repeating it changes nothing: codes that agree already are matched to themselves.
    """
    old, fitted, catalogue = open_bundle(replaces), Tokenizer.load(folder / TOKENIZER), read_tokens(folder)
    made = refit(fitted.quantizer, catalogue, old.tokenizer.quantizer, old.catalogue)
    tokenizer = Tokenizer(fitted.config, fitted.embedder, made.quantizer)
    write_tokens(folder, tokenizer, replace(catalogue, sids=made.sids, codebook=made.quantizer.version))
    pq.write_table(made.mapping, folder / MAPPING, compression="zstd")
    return {"codebook": made.quantizer.version, "kept": made.kept}


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
            init=bundle_folder(base) if base else None,
            code_vectors=None if base else Tokenizer.load(source / "tokenizer" / "tokenizer.safetensors").codebooks,
            ray_address=settings().ray_address,
            workers=settings().ray_workers,
            name=f"{run_id}-pretrain",
            store=f"checkpoints/{run_id}/pretrain",
        )

    inputs = {"tokens": tokens, "config": asdict(config), "preset": preset, "dropout": chosen.dropout, "base": base}
    return staged(run_id, "pretrain", inputs, ["data", "tokenizer"], work, resumes=True)


def align_run(run_id: str, *, pretrained: str, preset: str, overrides: str) -> str:
    """Stages ``reward``, whose AUC must pass RL's gate, and ``align``, which goes on from the pre-trained weights.

    Raises RewardTooWeak, and with roll-outs RolloutsUnavailable or RolloutsRefused.
    """
    chosen = recipe(preset, overrides)
    reward = _reward(run_id, chosen)
    if chosen.align.objective != "rsft":
        require(Run(connect(), run_id).summary("reward"), chosen.reward)

    def work(source: Path, folder: Path) -> dict[str, Any]:
        return align(
            source / "data",
            read_tokens(source / "tokenizer"),
            chosen.align,
            folder,
            init=source / "pretrain",
            reward=source / "reward",
            ray_address=settings().ray_address,
            workers=settings().ray_workers,
            name=f"{run_id}-align",
            store=f"checkpoints/{run_id}/align",
        )

    inputs = {"pretrained": pretrained, "config": asdict(chosen.align), "reward": reward}
    return staged(run_id, "align", inputs, ["data", "tokenizer", "pretrain", "reward"], work, resumes=True)


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
    return staged(run_id, "reward", inputs, ["data", "tokenizer"], work, resumes=True)


def run(stage: str, arguments: dict[str, str]) -> str:
    """A training stage by its name, as a pod or a RayJob runs it; returns its digest."""
    stages: dict[str, Callable[..., str]] = {"pretrain": pretrain_run, "align": align_run}
    if stage not in stages:
        raise ValueError(f"stage {stage!r} is unknown; give one of {', '.join(stages)}")
    return stages[stage](**arguments)


if __name__ == "__main__":  # what a RayJob runs on its head: python -m models.stages STAGE '{"run_id": ...}'
    print(run(sys.argv[1], json.loads(sys.argv[2])))
