"""Who is judged and by what; and the whole benchmark on a small simulated log."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import quality_rl
from benchmarks.quality_rl import ARMS, BASE, MEASURES, Size, asked, compare, play, report, verdict
from features.datasets import Dataset
from features.world.simulator import Simulator, SimulatorConfig
from models.tokenizer.interactions import times
from models.tokenizer.vocabulary import Catalogue


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return Simulator(SimulatorConfig(users=80, drift_day=None)).history()


@pytest.fixture(scope="module")
def since(dataset: Dataset) -> int:
    return int(np.quantile(times(dataset.exposures), 0.8))


def test_people_are_judged_by_new_long_views_of_after_the_date(dataset: Dataset, since: int, tmp_path: Path) -> None:
    n = dataset.items.num_rows
    bare = Catalogue.from_items(dataset.items, sids=np.zeros((n, 1), np.int32), codes=1, popularity=np.zeros(n))
    people = asked(dataset, since, bare, tmp_path, people=30)
    log = dataset.exposures.to_pandas()
    when = times(dataset.exposures)
    assert len(people.users) == len(set(people.users)) == len(people.context) <= 30
    for user, now, seen, wanted in zip(people.users, people.times_ms, people.seen, people.relevant, strict=True):
        mine = (log["user_id"] == user).to_numpy()
        starts = pd.Series(when[mine]).groupby(log["request_id"][mine].to_numpy()).min()
        assert now == starts[starts >= since].min()
        assert seen == set(log["item_id"][mine & (when < now)])
        later = set(log["item_id"][mine & (when >= now) & log["long_view"].to_numpy() & ~log["dislike"].to_numpy()])
        assert wanted == later - seen != set()
    with pytest.raises(ValueError, match="choose an earlier one"):
        asked(dataset, int(when.max()) + 1, bare, tmp_path / "late", people=30)


def test_differences_are_paired_by_person() -> None:
    luck = np.random.default_rng(0).random((60, len(MEASURES)))
    shifts = dict.fromkeys(ARMS, 0.0) | {"rsft": 0.1, "rsft + gbpo": -0.1}
    arms = {BASE: luck.tolist(), **{arm: (luck + shift).tolist() for arm, shift in shifts.items()}}
    found = compare([{"arms": arms}, {"arms": arms}])
    words = verdict(found["differences"])
    for arm, word in (("rsft", "better"), ("rsft + gbpo", "worse"), ("longer", "no difference seen")):
        gap = found["differences"][f"{arm} - {BASE}"]["recall@10"]
        assert gap["mean"] == pytest.approx(shifts[arm])
        assert gap["high"] - gap["low"] < 1e-9  # the luck that both share is gone
        assert f"recall@10 {word}" in words[f"{arm} - {BASE}"]


@pytest.mark.long
def test_all_arms_are_trained_and_judged(
    dataset: Dataset, since: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = Size(steps=4, align_steps=2, reward_steps=4, requests=16, people=12, codes=16)
    found = play(dataset, since, 0, size, tmp_path)
    assert set(found["arms"]) == {"popularity", BASE, *ARMS}
    for values in found["arms"].values():
        assert np.isfinite(values).all()
        assert np.shape(values) == (found["people"], len(MEASURES))
    assert all(found["training"][arm]["step"] == 2 for arm in ARMS)
    report([found], {"data": dataset.name, "since": "2022-05-05", "seeds": 1, "quick": True})
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert {"arms", "differences", "verdict", "command", "hardware", "seconds"} <= last.keys()


def test_what_an_arm_changes_is_a_field_of_alignment() -> None:
    fields = quality_rl.AlignConfig.__dataclass_fields__
    assert all(set(changes) <= set(fields) for changes in ARMS.values())
