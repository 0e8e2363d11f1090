"""The protocol, the rival and the whole command on a small data set with a rule that can be learned."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from benchmarks import quality, sasrec
from benchmarks.leave_one_out import Histories, accuracy
from benchmarks.protocol import DAY_MS, leave_one_out, time_split
from benchmarks.sasrec import SASRecConfig
from features.datasets import load
from models.tokenizer.vocabulary import Catalogue

ITEMS, USERS, LENGTH = 30, 60, 8
START_S = 1_400_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Amazon's layout: every user walks round the items one by one, one item a day."""
    path = tmp_path_factory.mktemp("walk")
    rows = [[(user * 7 + step) % ITEMS for step in range(LENGTH)] for user in range(USERS)]
    log = {
        "user_id": [f"u{user}" for user in range(USERS)],
        "item_ids": [[f"i{row}" for row in each] for each in rows],
        "timestamps": [[START_S + step * 86_400 for step in range(LENGTH)] for _ in rows],
    }
    pq.write_table(pa.table(log), path / "interactions.parquet")
    items = {
        "item_id": [f"i{row}" for row in range(ITEMS)],
        "title": [f"thing {row} of kind {row % 5}" for row in range(ITEMS)],
        "attributes": [[f"kind {row % 5}"] for row in range(ITEMS)],
    }
    pq.write_table(pa.table(items), path / "items.parquet")
    return path


@pytest.fixture(scope="module")
def exposures(folder: Path) -> pa.Table:
    return load(folder).exposures


@pytest.fixture(scope="module")
def histories(folder: Path, exposures: pa.Table) -> Histories:
    items = load(folder).items
    n = items.num_rows
    bare = Catalogue.from_items(items, sids=np.zeros((n, 1), np.int32), codes=1, popularity=np.zeros(n))
    return Histories.from_exposures(exposures, bare, limit=50)


def test_what_is_tested_on_is_never_learned_from(histories: Histories, exposures: pa.Table) -> None:
    split = leave_one_out(histories)
    assert not set(split.training) & (set(split.validation) | set(split.test))
    kept = set(split.training_table(exposures).column("exposure_id").to_pylist())
    names = np.asarray(exposures.column("exposure_id").to_pylist())
    hidden = np.concatenate([split.validation, split.test])
    assert not kept & set(names[histories.row[hidden]])
    assert len(kept) == exposures.num_rows - len(hidden)
    assert split.occurrences(ITEMS).sum() == len(kept)


def test_a_time_split_learns_from_the_past_alone(histories: Histories, exposures: pa.Table) -> None:
    date = START_S * 1000 + 6 * DAY_MS
    split = time_split(histories, date)
    assert histories.time_ms[split.training].max() < date - DAY_MS
    assert len(split.validation) == len(split.test) == USERS
    assert (histories.time_ms[split.test] == date).all()
    times = split.training_table(exposures).column("event_time").cast(pa.int64()).to_numpy()
    assert times.max() < date - DAY_MS
    with pytest.raises(ValueError, match="choose a date"):
        time_split(histories, START_S * 1000)


def test_ties_are_shuffled_and_order_in_time_is_kept(exposures: pa.Table, histories: Histories) -> None:
    same = exposures.set_column(
        exposures.schema.get_field_index("event_time"),
        "event_time",
        pa.array(np.full(exposures.num_rows, START_S * 1000), exposures.schema.field("event_time").type),
    )
    bare = Catalogue.from_items(
        pa.table({"item_id": [f"i{row}" for row in range(ITEMS)], "duration_ms": [0] * ITEMS}),
        sids=np.zeros((ITEMS, 1), np.int32),
        codes=1,
        popularity=np.zeros(ITEMS),
    )
    untied = Histories.from_exposures(exposures, bare, shuffle_ties=True)
    assert (untied.item == Histories.from_exposures(exposures, bare).item).all()
    tied = Histories.from_exposures(same, bare, shuffle_ties=True)
    assert (tied.item != Histories.from_exposures(same, bare).item).any()
    for start, end in zip(tied.starts[:-1], tied.starts[1:], strict=True):
        assert sorted(tied.item[start:end]) == sorted(histories.item[start:end])


def test_sasrec_learns_the_walk_and_never_ranks_what_was_seen(histories: Histories) -> None:
    split = leave_one_out(histories)
    config = SASRecConfig(width=32, dropout=0.1, epochs=30, every=30, learning_rate=5e-3)
    model = sasrec.train(split, ITEMS, config, lambda _: 1.0, lambda _: None)
    ranked = sasrec.rank(model, split, split.test, config, 10)
    assert accuracy(ranked, histories.item[split.test], (10,))["recall@10"] > 0.9
    for row, position in enumerate(split.test):
        assert not set(ranked[row]) & set(histories.seen(int(position)))


def test_the_command_reports_every_figure_and_resumes(folder: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(folder), "--quick", "--output", str(tmp_path)]
    first = CliRunner().invoke(quality.app, arguments)
    assert first.exit_code == 0, first.output
    record = json.loads(first.stdout.strip().splitlines()[-1])
    assert record["quick"] is True
    assert record["users"] == USERS
    assert {"recall10", "ndcg10", "seconds", "parameters", "sasrec_recall10"} <= record.keys()
    assert record["vs_sasrec_low"] <= record["vs_sasrec_recall10"] <= record["vs_sasrec_high"]
    again = CliRunner().invoke(quality.app, arguments)
    assert json.loads(again.stdout.strip().splitlines()[-1]) == record


def test_unknown_models_orders_and_dates_are_refused(folder: Path) -> None:
    for wrong, text in (("--model=gpt", "there are"), ("--orders=odd", "raw"), ("--since=May", "expected a date")):
        result = CliRunner().invoke(quality.app, ["--data", str(folder), wrong])
        assert result.exit_code == 2
        assert text in result.output
