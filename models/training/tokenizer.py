"""Fits the tokenizer as a stage: embeddings, codebooks, SIDs and their quality card, here or as a Ray Train job.

Same pattern as pre-training: the outcome lies in an output folder with the fingerprint of what it was made from; a
killed fit goes on from the QFormer's checkpoint, a finished one returns its metrics. Left out: several workers, as one
machine embeds and clusters a million items.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from models.tokenizer import card
from models.tokenizer.checkpoint import CHECKPOINT, checkpoint_step
from models.tokenizer.tokenizer import Tokenizer, TokenizerConfig
from models.tokenizer.vocabulary import Catalogue
from models.training.checkpoint import CONFIG, METRICS, sha256, write_json
from models.training.progress import Log
from models.training.ray import launch

TOKENIZER = "tokenizer.safetensors"
CARD = "card.html"


@dataclass(frozen=True, kw_only=True)
class TokenizerJob:
    """One fit: everything a worker needs. ``data`` holds items.parquet and exposures.parquet."""

    data: Path
    config: TokenizerConfig
    output: Path
    init: None = None

    def fingerprint(self) -> dict[str, Any]:
        """What decides the outcome."""
        files = {name: sha256(self.data / f"{name}.parquet") for name in ("items", "exposures")}
        record = {"stage": "tokenizer", "config": asdict(self.config), **files}
        decoded: dict[str, Any] = json.loads(json.dumps(record))
        return decoded


def fit_tokenizer(
    data: Path, config: TokenizerConfig, output: Path, *, ray_address: str = "", name: str = "tokenizer"
) -> dict[str, Any]:
    """Fits into ``output`` (tokenizer.safetensors, sids.parquet, items.parquet, card.html, config.json, metrics.json).

    Returns the quality of the SIDs. A rerun resumes; a finished one returns its metrics.
    """
    return launch(train, TokenizerJob(data=data, config=config, output=output), ray_address=ray_address, name=name)


def train(job: TokenizerJob) -> dict[str, Any]:
    """What the worker runs."""
    items, exposures = (pq.read_table(job.data / f"{name}.parquet") for name in ("items", "exposures"))
    losses: dict[str, float] = {}
    job.output.mkdir(parents=True, exist_ok=True)
    with Log(job.output, 0, checkpoint_step(job.output), write=True) as log:

        def report(record: Mapping[str, float]) -> None:
            losses.update(record)
            log.write(record)

        tokenizer = Tokenizer.fit(items, exposures, job.config, keep=job.output, report=report)
    catalogue = tokenizer.catalogue(items, exposures)
    write_tokens(job.output, tokenizer, catalogue)
    parts = {f"alignment/{name}": losses[name] for name in ("loss", "u2i", "i2i", "caption") if name in losses}
    metrics = write_card(job.output, {**tokenizer.quality(catalogue, items, exposures), **parts})
    write_json(job.output / CONFIG, {"tokenizer": asdict(job.config), "training": job.fingerprint()})
    (job.output / CHECKPOINT).unlink(missing_ok=True)
    write_json(job.output / METRICS, metrics)
    return metrics


def write_tokens(folder: Path, tokenizer: Tokenizer, catalogue: Catalogue) -> None:
    """Writes tokenizer and SID table into ``folder``."""
    tokenizer.save(folder / TOKENIZER)
    sids, items = catalogue.to_tables()
    pq.write_table(sids, folder / "sids.parquet", compression="zstd")
    pq.write_table(items, folder / "items.parquet", compression="zstd")


def read_tokens(folder: Path) -> Catalogue:
    """The SID table that ``write_tokens`` wrote."""
    return Catalogue.from_tables(pq.read_table(folder / "sids.parquet"), pq.read_table(folder / "items.parquet"))


def write_card(folder: Path, quality: dict[str, Any]) -> dict[str, Any]:
    """Draws the quality card into ``folder``; returns ``quality``."""
    (folder / CARD).write_text(card.html(quality), encoding="utf-8")
    return quality
