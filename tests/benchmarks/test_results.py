"""The page says what the kept runs say, and its pictures are pictures."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import typer

from benchmarks.quality_report import MEASURES, gain
from benchmarks.results import main
from benchmarks.svg import Bar, bars

TESTS = 400
FACTS = {
    "protocol": "leave-one-out",
    "timestamps": True,
    "interactions": 5000,
    "users_too_short": 7,
    "users": TESTS,
    "items": 300,
    "unseen_tests": 11,
    "items_without_title": 5,
    "data": "shop",
    "since": "",
    "seeds": 2,
}


def keep(folder: Path, kind: str, seed: int, best: int) -> np.ndarray:
    """A run whose places are drawn from ``best`` on."""
    path = folder / f"{kind}-raw-{seed}"
    path.mkdir(parents=True)
    places = np.random.default_rng((seed, best)).integers(best, 60, TESTS)
    means = {name: float(gain(places, name).mean()) for name in ("recall@5", "ndcg@5", *MEASURES, "recall@50")}
    run = {"kind": kind, "order": "raw", "seed": seed, "seconds": 61.0 + seed, "parameters": 1_500_000}
    (path / "run.json").write_text(json.dumps(run | {"test": means, "validation": means}))
    np.save(path / "places.npy", places)
    return places


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "shop"
    for seed in (0, 1):
        keep(folder, "v2", seed, best=0)
        keep(folder, "sasrec", seed, best=8)
    keep(folder, "popularity", 0, best=20)
    (folder / "data.json").write_text(json.dumps(FACTS))
    np.save(folder / "kinds-raw.npy", np.repeat(np.array([-2, -1, 0, 1], np.int8), TESTS // 4))
    return tmp_path / "runs"


def cells(page: str, start: str) -> list[str]:
    """The first table row that starts so."""
    row = next(line for line in page.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_page_holds_means_intervals_and_kinds(runs: Path, tmp_path: Path) -> None:
    main(runs, output=tmp_path / "docs")
    page = (tmp_path / "docs" / "results.md").read_text()
    places = [np.load(runs / "shop" / f"v2-raw-{seed}" / "places.npy") for seed in (0, 1)]
    recall = float(np.mean([(each < 10).mean() for each in places]))
    row = cells(page, "v2:")
    assert row[1] == "2"
    assert f"**{recall:.4f}**" in row
    assert "1.50 M" in row
    assert row[-1] == "62"  # the slowest seed
    gap = cells(page, "v2 - sasrec")
    mean, low, high = (float(part) for part in gap[2].replace("[", "").replace("]", "").replace(",", "").split())
    rivals = [np.load(runs / "shop" / f"sasrec-raw-{seed}" / "places.npy") for seed in (0, 1)]
    assert mean == pytest.approx(recall - np.mean([(each < 10).mean() for each in rivals]), abs=1e-4)
    assert 0 < low < mean < high
    assert cells(page, "popularity - sasrec")[1] == "2"  # nothing random: one run stands against both seeds
    assert cells(page, "v2 - popularity")[1] == "2"
    assert cells(page, "cold")[1] == str(TESTS // 2)
    for fact in ("7 users with fewer than 3", "11 tests ask for", "5 of them without a title", "--seeds 2"):
        assert fact in page
    pictures = list((tmp_path / "docs" / "results").glob("*.svg"))
    assert pictures
    assert all(f"results/{path.name}" in page and ElementTree.parse(path) is not None for path in pictures)


def test_learning_from_feedback_is_reported_with_its_verdict(runs: Path, tmp_path: Path) -> None:
    gap = {"mean": 0.01, "low": -0.02, "high": 0.03, "pairs": 9}
    record = {
        "data": "x",
        "since": "2022-05-05",
        "people": 9,
        "seeds": 1,
        "arms": {"pretrained": {"recall@10": {"mean": 0.2, "std": 0.0}, "stay_s": {"mean": 33.0, "std": 0.0}}},
        "differences": {"rsft - pretrained": {"recall@10": gap, "stay_s": gap}},
        "verdict": {"rsft - pretrained": "recall@10 no difference seen"},
    }
    (tmp_path / "rl.json").write_text("progress\n" + json.dumps(record) + "\n")
    main(runs, rl=tmp_path / "rl.json", output=tmp_path / "docs")
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "+0.0100 [-0.0200, +0.0300]" in cells(page, "rsft - pretrained")
    assert "* rsft - pretrained: recall@10 no difference seen" in page


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="holds no kept runs"):
        main(tmp_path, output=tmp_path / "docs")


def test_bars_share_a_scale_and_grow_from_zero() -> None:
    rows = [
        Bar(label="a < b", value=2.0, low=1.5, high=2.5, strong=True),
        Bar(label="half", value=1.0, low=1.0, high=1.0),
        Bar(label="below", value=-1.0, low=-1.5, high=-0.5),
    ]
    root = ElementTree.fromstring(bars("lengths & signs", rows))
    drawn = list(root.iter("{http://www.w3.org/2000/svg}rect"))[1:]
    left, width = ([float(rect.attrib[name]) for rect in drawn] for name in ("x", "width"))
    assert width[0] == pytest.approx(2 * width[1], abs=0.3)
    assert width[1] == pytest.approx(width[2], abs=0.3)
    assert left[0] == left[1] == pytest.approx(left[2] + width[2], abs=0.3)
    with pytest.raises(ValueError, match="no bars"):
        bars("nothing", [])
