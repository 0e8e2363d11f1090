"""The whole command on data that lack something: it works and says so, or refuses with one message."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from typer.testing import CliRunner

from benchmarks import quality
from benchmarks.quality_data import digest
from features.datasets import load

START, DAY = 1_400_000_000, 86_400
LISTS = [[(user + step) % 12 for step in range(6)] for user in range(9)]


def write(folder: Path, lists: list[list[int]] = LISTS, times: list[list[int]] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    days = times or [[START + DAY * step for step in range(len(items))] for items in lists]
    log = {"user_id": list(range(len(lists))), "item_ids": lists, "timestamps": days}
    pq.write_table(pa.table(log), folder / "interactions.parquet")
    ids = sorted({item for items in lists for item in items})
    pq.write_table(pa.table({"item_id": ids, "title": [f"thing {k}" for k in ids]}), folder / "items.parquet")
    return folder


def asked(data: Path, output: Path, *more: str) -> Result:
    arguments = ["--data", str(data), "--model=popularity", "--output", str(output), *more]
    return CliRunner().invoke(quality.app, arguments, env={"COLUMNS": "300"})


def record(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return found


def said(result: Result) -> str:
    return " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("make", "more", "words"),
    [
        (lambda f: f.mkdir(), [], "holds no log that is understood (found: nothing)"),
        (lambda f: f.write_text("x"), [], "a file, not a folder"),
        (lambda f: None, [], "does not exist"),
        (lambda f: write(f, [[0] * 6] * 4), [], "1 item; to rank items takes at least 2"),
        (lambda f: write(f, [[0, 1, 2]] * 4), [], "none of 4 users has 4 positive interactions"),
        (lambda f: write(f), ["--since=1999-01-01"], "0 interactions to learn from, 0 to validate and 9 to"),
        (lambda f: write(f), ["--since=2024-01-01"], "0 to validate and 0 to test on; choose a date"),
        (lambda f: write(f), ["--map=user_id=uid"], "the map lacks item_id, event_time"),
    ],
    ids=["empty", "file", "nothing", "one item", "short", "before all", "after all", "map"],
)
def test_data_that_cannot_be_tested_on_are_refused(
    make: Callable[[Path], Any], more: list[str], words: str, tmp_path: Path
) -> None:
    make(tmp_path / "data")
    result = asked(tmp_path / "data", tmp_path / "out", *more)
    assert result.exit_code == 2, result.output
    assert words in said(result)
    assert not (tmp_path / "out").exists()


def test_runs_are_kept_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    result = asked(write(tmp_path / "data"), tmp_path / "out")
    assert result.exit_code == 2
    assert "is a file" in said(result)


def test_odd_times_and_repeats_are_counted_and_said(tmp_path: Path) -> None:
    lists = [*LISTS, [1, 2, 3, 4, 1], [5, 6, 7, 8, 9]]
    times = [[START + DAY * step for step in range(len(items))] for items in lists]
    times[0][2] = times[1][0] = -1
    times[-1].reverse()
    result = asked(write(tmp_path / "data", lists, times), tmp_path / "out", "--quick")
    found = record(result)
    wanted = {"interactions_untimed": 2, "users_unordered": 1, "repeat_tests": 1, "quick": True, "timestamps": True}
    assert {name: found[name] for name in wanted} == wanted
    for words in ("2 interactions have no time", "The times of 1 users run backwards", "1 of 11 tests ask for an item"):
        assert words in said(result)


def test_runs_on_other_data_of_the_same_name_are_kept_apart(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a" / "data"), write(tmp_path / "b" / "data", [items[::-1] for items in LISTS])
    apart = f"data-quick-{digest(load(other))}"
    first = record(asked(one, tmp_path / "out", "--quick"))
    second = asked(other, tmp_path / "out", "--quick")
    assert "holds runs on other data" in said(second)
    assert record(second)["digest"] == digest(load(other)) != first["digest"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data-quick", apart]
    again = asked(one, tmp_path / "out", "--quick")
    assert record(again) == first
    assert "raw order" not in said(again), "nothing is fitted again"
    places = [np.load(tmp_path / "out" / name / "popularity-raw-0" / "places.npy") for name in ("data-quick", apart)]
    assert not np.array_equal(*places)


def test_runs_that_were_kept_before_data_had_a_digest_are_found(tmp_path: Path) -> None:
    data = write(tmp_path / "data")
    first = record(asked(data, tmp_path / "out", "--quick"))
    kept = tmp_path / "out" / "data-quick" / "data.json"
    facts = json.loads(kept.read_text())
    kept.write_text(json.dumps({name: facts[name] for name in ("users", "items", "interactions", "quick")}))
    again = asked(data, tmp_path / "out", "--quick")
    assert record(again) == first
    assert "raw order" not in said(again)


def test_another_layout_is_read_by_a_map(tmp_path: Path) -> None:
    rows = [f"{u},{i},{START + DAY * step}" for u, items in enumerate(LISTS) for step, i in enumerate(items)]
    (tmp_path / "log.csv").write_text("\n".join(["who,what,when", *rows]))
    mapped = asked(tmp_path / "log.csv", tmp_path / "out", "--quick", "--map=user_id=who,item_id=what,event_time=when")
    listed = record(asked(write(tmp_path / "data"), tmp_path / "out", "--quick"))
    shared = ("recall10", "sasrec_recall50", "users", "interactions", "items_unseen")
    assert {name: record(mapped)[name] for name in shared} == {name: listed[name] for name in shared}
