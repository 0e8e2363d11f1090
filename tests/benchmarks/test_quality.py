"""The protocol, the rival and the whole command on a small data set with a rule that can be learned."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from benchmarks import quality, sasrec
from benchmarks.leave_one_out import Histories, accuracy
from benchmarks.protocol import DAY_MS, Split, leave_one_out, time_split
from benchmarks.quality_data import COLD, kinds, targets
from benchmarks.quality_generator import PATIENCE, Examples, Recipe, train
from benchmarks.quality_models import MODELS, Question
from benchmarks.sasrec import SASRecConfig
from features.datasets import load
from models.generator import Generator
from models.onerec_session import SessionConfig
from models.tokenizer.vocabulary import Catalogue

ITEMS, USERS, LENGTH = 30, 60, 8
START_S = 1_400_000_000


def write(path: Path, rows: list[list[int]], seconds: list[list[int]], titles: list[str | None]) -> Path:
    """Amazon's layout: of every user the items and times (no column when all are 0), of every item the title."""
    log = {
        "user_id": [f"u{user}" for user in range(len(rows))],
        "item_ids": [[f"i{row}" for row in each] for each in rows],
        **({"timestamps": seconds} if any(map(any, seconds)) else {}),
    }
    pq.write_table(pa.table(log), path / "interactions.parquet")
    items = {
        "item_id": [f"i{row}" for row in range(len(titles))],
        "title": pa.array(titles, pa.string()),
        "attributes": [[f"kind {row % 5}"] for row in range(len(titles))],
    }
    pq.write_table(pa.table(items), path / "items.parquet")
    return path


def walk(user: int, length: int = LENGTH) -> list[int]:
    """Round the items one by one."""
    return [(user * 7 + step) % ITEMS for step in range(length)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every user walks round the items, one item a day."""
    days = [[START_S + step * 86_400 for step in range(LENGTH)]] * USERS
    titles: list[str | None] = [f"thing {row} of kind {row % 5}" for row in range(ITEMS)]
    return write(tmp_path_factory.mktemp("walk"), [walk(user) for user in range(USERS)], days, titles)


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


def test_nobody_teaches_anything_after_the_date(histories: Histories, exposures: pa.Table) -> None:
    date = START_S * 1000 + 6 * DAY_MS
    since = pa.array([date - DAY_MS, date - 1, date, date + DAY_MS]).cast(exposures.schema.field("event_time").type)
    column = exposures.schema.get_field_index("event_time")
    late = exposures.slice(0, 4).set_column(column, exposures.schema.field(column), since)
    log = pa.concat_tables([exposures, late])  # rows that stand in no history
    split = time_split(histories, date)
    assert split.training_table(log).equals(split.training_table(exposures))
    past = int((histories.time_ms < date - DAY_MS).sum())
    assert split.occurrences(ITEMS).sum() == past


def test_ties_are_shuffled_and_order_in_time_is_kept(folder: Path, tmp_path: Path) -> None:
    two_a_day = [[START_S + step // 2 * 86_400 for step in range(LENGTH)]] * USERS
    write(tmp_path, [walk(user) for user in range(USERS)], two_a_day, [f"thing {row}" for row in range(ITEMS)])
    for path, tied in ((folder, False), (tmp_path, True)):
        plain = Question(dataset=load(path), seed=0, shuffled=False, since=None, quick=False)
        published, shuffled = plain.split.histories.item, replace(plain, shuffled=True).split.histories.item
        assert (published == np.concatenate([walk(int(u[1:])) for u in sorted(f"u{n}" for n in range(USERS))])).all()
        assert (published != shuffled).any() == tied
        days = (np.sort(each.reshape(-1, 2)) for each in (published, shuffled))
        assert (next(days) == next(days)).all()


def test_sasrec_learns_the_walk_and_never_ranks_what_was_seen(histories: Histories) -> None:
    split = leave_one_out(histories)
    config = SASRecConfig(width=32, dropout=0.1, epochs=30, every=30, least_steps=1, learning_rate=5e-3)
    model = sasrec.train(split, ITEMS, config, lambda _: 1.0, lambda _: None)
    ranked = sasrec.rank(model, split, split.test, config, 10)
    assert accuracy(ranked, histories.item[split.test], (10,))["recall@10"] > 0.9
    for row, position in enumerate(split.test):
        assert not set(ranked[row]) & set(histories.seen(int(position)))


@pytest.mark.parametrize(("steps", "expected"), [(55, (4, 40)), (50, (4, 40)), (15, (14, 140)), (1, (200, 2000))])
def test_a_small_set_is_looked_at_as_rarely_as_a_large_one(steps: int, expected: tuple[int, int]) -> None:
    every, epochs = sasrec.looks(SASRecConfig(), steps)
    assert (every, epochs) == expected
    assert every * steps >= SASRecConfig().least_steps


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
    assert again.stderr.count("v2, raw") == 0
    for name in ("run.json", "recipe.json"):  # as another recipe would have left them, checkpoints included
        kept = next(tmp_path.glob(f"*/v2-raw-0/{name}"))
        kept.write_text(kept.read_text().replace('"limit": 50', '"limit": 49'))
    anew = CliRunner().invoke(quality.app, arguments)
    assert anew.exit_code == 0, anew.output
    assert "v2, raw order, seed 0" in anew.stderr


def test_unknown_models_orders_and_dates_are_refused(folder: Path) -> None:
    for wrong, text in (("--model=gpt", "there are"), ("--orders=odd", "raw"), ("--since=May", "expected a date")):
        result = CliRunner().invoke(quality.app, ["--data", str(folder), wrong])
        assert result.exit_code == 2
        assert text in result.output


def trained(
    split: Split, catalogue: Catalogue, values: list[float], output: Path
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A model whose validation says ``values``, epoch by epoch, NaN to be killed: its head, and that of every epoch."""
    base = Recipe()
    small = replace(base.model, d_model=32, embed=8, heads=2, kv_groups=2, layers=1)
    recipe = replace(base, model=small, training=replace(base.training, epochs=len(values), warmup_steps=1))
    heads: list[torch.Tensor] = []
    left = iter(values)

    def judge(model: Generator) -> float:
        value = next(left)
        if np.isnan(value):
            raise KeyboardInterrupt
        heads.append(next(model.parameters()).detach().clone())
        return value

    codebooks = np.random.default_rng(0).normal(size=(catalogue.levels, catalogue.codes, 8)).astype(np.float32)
    model, _ = train(split, catalogue, codebooks, recipe, output, judge)
    return next(model.parameters()).detach(), heads


def test_training_ends_with_the_weights_that_validation_likes_best(
    folder: Path, histories: Histories, tmp_path: Path
) -> None:
    items = load(folder).items
    sids = np.stack([np.arange(ITEMS) // 6, np.arange(ITEMS) % 6], 1).astype(np.int32)
    catalogue = Catalogue.from_items(items, sids=sids, codes=6, popularity=np.zeros(ITEMS))
    split, values = leave_one_out(histories), [0.1, 0.3, 0.2, 0.25, 0.2, 0.9]
    best, heads = trained(split, catalogue, values, tmp_path / "whole")
    assert len(heads) == 2 + PATIENCE
    assert torch.equal(best, heads[1])
    assert not torch.equal(best, heads[-1])
    with pytest.raises(KeyboardInterrupt):
        trained(split, catalogue, [0.1, 0.3, 0.2, float("nan"), 0.2, 0.9], tmp_path / "killed")
    resumed, _ = trained(split, catalogue, [0.25, 0.2, 0.1, 0.1, 0.1, 0.1], tmp_path / "killed")
    assert torch.equal(resumed, best)


@pytest.mark.parametrize("kind", ["v1", "session", "tiger"])
def test_other_architectures_are_fitted_and_rank_unseen_items(kind: str, folder: Path, tmp_path: Path) -> None:
    question = Question(dataset=load(folder), seed=0, shuffled=False, since=None, quick=True)
    ranked = MODELS[kind].fit(question, tmp_path / "run", lambda _: None).rank(question.split.test)
    for row, position in enumerate(question.split.test):
        assert not set(ranked[row]) & set(question.split.histories.seen(int(position)))
    assert ranked.shape == (USERS, 50)
    assert (ranked[:, :10] >= 0).all()


def test_a_session_holds_the_next_interactions_that_may_be_learned_from(histories: Histories) -> None:
    n = np.arange(ITEMS)
    items = pa.table({"item_id": [f"i{row}" for row in n], "duration_ms": [0] * ITEMS})
    catalogue = Catalogue.from_items(items, sids=n[:, None].astype(np.int32), codes=ITEMS, popularity=np.zeros(ITEMS))
    split = leave_one_out(histories)
    recipe = replace(Recipe(), model=SessionConfig(items=5))
    batch = Examples(split, catalogue, recipe)(0)
    assert (batch.targets[:, 0] >= 0).all()
    hidden = {int(position) for position in np.r_[split.validation, split.test]}
    for row in batch.targets[..., 0].tolist():
        real = [code for code in row if code >= 0]
        assert row == real + [-1] * (5 - len(real))
        assert all((b - a) % ITEMS == 1 for a, b in itertools.pairwise(real))
    longest = (batch.targets[..., 0] >= 0).sum(1)
    assert sorted(set(longest.tolist())) == list(range(1, min(5, LENGTH - 3) + 1))
    assert hidden.isdisjoint(split.training)


def lacking(path: Path, seconds: int) -> Path:
    """Eight users of the walk, two of two items; the last of user 0 is an item nobody else takes; titles are gone."""
    rows = [walk(user) for user in range(8)] + [walk(8, 2), walk(9, 2)]
    rows[0][-1] = ITEMS
    times = [[seconds + step * 86_400 if seconds > 0 else seconds for step in range(len(each))] for each in rows]
    return write(path, rows, times, [None if row % 2 else " " for row in range(ITEMS + 1)])


def test_what_the_data_lack_is_said_and_does_not_stop_the_run(tmp_path: Path) -> None:
    path = lacking(tmp_path, seconds=-1)
    arguments = ["--data", str(path), "--model=popularity", "--seeds=2", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(quality.app, [*arguments, "--quick"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout.strip().splitlines()[-1])
    wanted = {"timestamps": False, "users": 8, "users_too_short": 2, "unseen_tests": 1, "seeds": 1}
    assert {name: record[name] for name in wanted} == wanted
    assert record["items_without_title"] == record["items"] == ITEMS + 1
    assert "recall10_shuffled" not in record
    said = " ".join(result.stderr.split())
    for sentence in ("no times", "2 of 10 users", "1 of 8 tests ask for one", "31 of 31 items have no title", "Quick"):
        assert sentence in said


def test_the_recipe_names_items_without_titles_and_times(tmp_path: Path) -> None:
    data = load(lacking(tmp_path, seconds=0))
    question = Question(dataset=data, seed=0, shuffled=False, since=None, quick=True)
    fitted = MODELS["v2"].fit(question, tmp_path / "run", lambda _: None)
    ranked = fitted.rank(question.split.test)
    assert (ranked[:, :10] >= 0).all()
    assert ITEMS in ranked  # never learned from, and its SID can still be generated


def test_kinds_of_tests_by_what_was_learned_from(tmp_path: Path) -> None:
    question = Question(dataset=load(lacking(tmp_path, START_S)), seed=0, shuffled=False, since=None, quick=False)
    often = question.split.occurrences(ITEMS + 1)
    found, wanted = kinds(question), targets(question.split)
    assert (found[often[wanted] == 0] == -2).all()
    assert (found == -2).any()
    assert (found[(often[wanted] > 0) & (often[wanted] <= COLD)] == -1).all()
    assert (often[wanted[found == 1]] > COLD).all()


def test_no_time_split_of_data_without_times(tmp_path: Path) -> None:
    result = CliRunner().invoke(quality.app, ["--data", str(lacking(tmp_path, -1)), "--since=2014-01-01"])
    assert result.exit_code == 2
    assert "no times" in " ".join(result.output.replace("│", " ").split())


def test_a_log_of_short_users_is_refused(tmp_path: Path) -> None:
    rows = [walk(user, 2) for user in range(4)]
    write(tmp_path, rows, [[START_S, START_S + 60]] * 4, ["a thing"] * ITEMS)
    result = CliRunner().invoke(quality.app, ["--data", str(tmp_path)])
    assert result.exit_code == 2
    assert "3 positive interactions" in " ".join(result.output.replace("│", " ").split())
