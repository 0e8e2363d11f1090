"""Going on from earlier weights on a newer window, with items appended in between."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from safetensors.torch import load_file

from models.tokenizer.vocabulary import Catalogue
from models.training.pretrain import PretrainConfig, pretrain

CONFIG = PretrainConfig(epochs=4, batch_requests=16, learning_rate=1e-2, warmup_steps=5, threads=1, log_every=1)
OLD_ITEMS = 40


@pytest.fixture(scope="module")
def older(log, write_log, tmp_path_factory):
    """The first half of the log, of the first items only, with a catalogue that has no others."""
    times = log.exposures.column("event_time").cast(pa.int64()).to_numpy()
    known = pa.array(log.catalogue.item_ids[:OLD_ITEMS])
    early = pc.and_(pa.array(times < np.median(times)), pc.is_in(log.exposures.column("item_id"), known))
    made = write_log(tmp_path_factory.mktemp("older") / "data", log.exposures.filter(early))
    items, sids = log.catalogue.items.slice(0, OLD_ITEMS), log.catalogue.sids[:OLD_ITEMS]
    return replace(made, catalogue=Catalogue.from_items(items, sids=sids, codes=log.catalogue.codes))


@pytest.fixture(scope="module")
def base(older, model_config, tmp_path_factory) -> Path:
    """The weights in production, trained on the older window."""
    folder = tmp_path_factory.mktemp("base")
    pretrain(older.folder, older.catalogue, model_config, CONFIG, folder)
    return folder


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_appended_items_are_learned_from_the_weights_before(log, older, base, model_config, tmp_path) -> None:
    appended = older.catalogue.append(log.catalogue.items.slice(OLD_ITEMS), log.catalogue.sids[OLD_ITEMS:])
    assert np.array_equal(appended.sids[:OLD_ITEMS], older.catalogue.sids)
    config = replace(CONFIG, max_steps=12, learning_rate=3e-3)
    window = (log.folder, appended, model_config, config)
    went_on = pretrain(*window, tmp_path / "on", init=base)
    scratch = pretrain(*window, tmp_path / "scratch")
    without = pretrain(log.folder, older.catalogue, model_config, config, tmp_path / "without", init=base)
    assert went_on["exposures_per_epoch"] > without["exposures_per_epoch"]
    assert went_on["holdout/targets"] > without["holdout/targets"]
    assert went_on["holdout/loss"] < scratch["holdout/loss"] - 0.05
    assert records(tmp_path / "on")[0]["loss"] < records(tmp_path / "scratch")[0]["loss"]


def test_the_optimizer_starts_anew_and_warms_up(log, base, model_config, tmp_path) -> None:
    pretrain(log.folder, log.catalogue, model_config, replace(CONFIG, max_steps=25), tmp_path, init=base)
    rates = [record["lr"] for record in records(tmp_path)]
    assert rates[0] == pytest.approx(CONFIG.learning_rate / 5)
    assert max(rates) == pytest.approx(CONFIG.learning_rate)
    start, end = load_file(base / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert start.keys() == end.keys()
    assert any(not start[name].equal(end[name]) for name in start)
