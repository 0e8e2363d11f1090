from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.schema import ITEM, conform
from models.rewards.industrial import DAY_MS, Rule, industrial_reward, kinds, load_rules, shares

NOW = 1_767_225_600_000
RULES = """
[[rule]]
name = "viral"
attribute = "tag"
values = ["viral", "meme"]
target_share = 0.2
alpha = 0.5

[[rule]]
name = "new uploads"
attribute = "age_days"
below = 3
target_share = 0.1
boost = 2
"""


def items() -> pa.Table:
    columns = {
        "item_id": ["a", "b", "c", "d"],
        "tags": [["viral"], ["cats", "meme"], ["cats"], None],
        "author_id": ["x", "y", None, "x"],
        "duration_ms": [5_000, 10_000, 20_000, 40_000],
        "upload_time": pa.array([NOW - DAY_MS, NOW - 9 * DAY_MS, NOW - 2 * DAY_MS, None], pa.timestamp("ms", "UTC")),
    }
    return conform(pa.table(columns), ITEM)


@pytest.fixture
def rules(tmp_path: Path) -> tuple[Rule, ...]:
    (tmp_path / "rules.toml").write_text(RULES)
    return load_rules(tmp_path / "rules.toml")


def test_rules_name_their_items(rules) -> None:
    extra = (
        Rule(name="x", attribute="author", values=("x",), target_share=0, alpha=0.5),
        Rule(name="long", attribute="duration_s", at_least=10, below=40, target_share=0, alpha=0.5),
        Rule(name="popular", attribute="popularity_rank", at_least=0.75, target_share=0, alpha=0.5),
    )
    found = kinds((*rules, *extra), items(), np.array([1.0, 9.0, 3.0, 2.0]), NOW)
    assert found.tolist() == [
        [True, True, False, False],
        [True, False, True, False],  # an unknown upload time is not new
        [True, False, False, True],
        [False, True, True, False],
        [False, True, False, False],
    ]


def test_rules_act_only_beyond_their_target(rules) -> None:
    mask = kinds(rules, items(), np.zeros(4), NOW)
    rewards, rows = np.array([[1.0, 1.0, 1.0, 1.0, 1.0]]), np.array([[0, 1, 2, 3, -1]])
    served = np.array([0, 1, 1, 3, -1])
    np.testing.assert_allclose(shares(mask, served), [0.75, 0.25])
    changed, touched = industrial_reward(rewards, rows, rules, mask, shares(mask, served))
    assert changed.tolist() == [[0.5, 0.5, 1.0, 1.0, 1.0]]
    assert touched == {"industrial/viral": 0.4, "industrial/new uploads": 0.0}
    changed, _ = industrial_reward(rewards, rows, rules, mask, np.array([0.1, 0.05]))
    assert changed.tolist() == [[2.0, 1.0, 2.0, 1.0, 1.0]]
    both, _ = industrial_reward(rewards, rows, rules, mask, np.array([0.9, 0.05]))
    assert both[0, 0] == 1.0
    assert not shares(mask, np.array([-1])).any()


@settings(max_examples=100)
@given(st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=9), st.floats(0.01, 0.99), st.integers(0, 99))
def test_damping_never_helps_and_boosting_never_hurts(rewards: list[float], factor: float, seed: int) -> None:
    given_rewards = np.array(rewards)
    rows = np.random.default_rng(seed).integers(-1, 3, len(rewards))
    mask = np.array([[True, False, True]])
    damped = Rule(name="d", attribute="tag", values=("t",), target_share=0.5, alpha=factor)
    boosted = Rule(name="b", attribute="tag", values=("t",), target_share=0.5, boost=1 / factor)
    lower, _ = industrial_reward(given_rewards, rows, (damped,), mask, np.array([0.9]))
    higher, _ = industrial_reward(given_rewards, rows, (boosted,), mask, np.array([0.1]))
    assert (lower <= given_rewards).all()
    assert (higher >= given_rewards).all()
    untouched = ~np.isin(rows, [0, 2])
    assert (lower[untouched] == given_rewards[untouched]).all()
    np.testing.assert_allclose(industrial_reward(lower, rows, (boosted,), mask, np.array([0.1]))[0], given_rewards)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('alpha = 0.5', 'alpha = 1.5'), "less than 1"),
        (('alpha = 0.5', 'alpha = 0.5\nboost = 2'), "either alpha"),
        (('below = 3', 'values = ["a"]'), "give at_least or below"),
        (('values = ["viral", "meme"]', ''), "give values"),
        (('target_share = 0.2', 'target_share = 2'), "target_share"),
        (('name = "new uploads"', 'name = "viral"'), "names a rule twice"),
        (('[[rule]]\nname = "viral"', '[rules]\nname = "viral"'), "expected \\[\\[rule\\]\\]"),
        (('attribute = "tag"', 'attribute = "mood"'), "attribute"),
        (('boost = 2', 'boost = '), "cannot be read"),
    ],
)  # fmt: skip
def test_wrong_rules_are_refused_with_the_file(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(RULES.replace(*change, 1))
    with pytest.raises(ValueError, match=message) as error:
        load_rules(path)
    assert "rules.toml" in str(error.value)


def test_shapes_are_checked(rules) -> None:
    with pytest.raises(ValueError, match="must agree"):
        industrial_reward(np.zeros(3), np.zeros(2, int), rules, np.zeros((2, 4), bool), np.zeros(2))
