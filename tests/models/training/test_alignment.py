import json

import pytest

from models.presets import recipe
from models.training.alignment import AlignConfig

FREE = {"signal": "rollouts", "constrained": False}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"objective": "ppo"}, "objective 'ppo' must be one of rsft, gbpo"),
        ({"signal": "likes"}, "signal 'likes'"),
        ({"objective": "ecpo"}, "'ecpo' cannot learn from 'exposures'"),
        ({"objective": "s-dpo"}, "'s-dpo' cannot learn from 'exposures'"),
        ({"objective": "rsft", "signal": "rollouts"}, "'rsft' cannot learn from 'rollouts'"),
        ({"format": "random"}, "it needs roll-outs"),
        ({"format": "top", "signal": "rollouts"}, "constrained false"),
        ({"format": "top", "objective": "dpo", **FREE}, "drawn"),
        ({"format": "random", "format_samples": 33, **FREE}, "format_samples 33 must be in 1 .. group 32"),
        ({"group": 1}, "group 1 at least 2"),
        ({"objective": "s-dpo", "signal": "rollouts", "group": 4, "losers": 4}, "group 4 at least 5"),
        ({"learned": 1}, "learned is 1: give 0 or 2 .. group 32"),
        ({"learned": 33}, "learned is 33"),
        ({"learned": 8, "format": "random", **FREE}, "0 with a format reward"),
        ({"objective": "s-dpo", "signal": "rollouts", "losers": 4, "learned": 4}, "give 0 or 5 .. group 32"),
        ({"push_every": 0}, "push_every 0"),
        ({"patience_s": -1.0}, "patience_s is -1.0"),
        ({"own_share": 1.5}, "own_share 1.5: shares lie in"),
        ({"users_share": -0.1}, "users_share -0.1"),
        ({"beta": 0.0}, "beta 0.0 must be above 0"),
        ({"epsilon": 1.0}, "epsilon 1.0"),
        ({"rules": "[[rule]]\nname = 'x'"}, "align.rules"),
        ({"rules": "x = 1"}, r"expected \[\[rule\]\] tables only"),
    ],
)
def test_impossible_alignments_are_refused(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AlignConfig(**wrong)


def test_every_choice_is_a_field_of_the_recipe() -> None:
    wanted = {
        "align.objective": "ecpo",
        "align.signal": "hybrid",
        "align.format": "random",
        "align.constrained": False,
        "align.own_share": 0.25,
        "align.epochs": 2,
        "align.rules": "[[rule]]\nname='new'\nattribute='age_days'\nbelow=3\ntarget_share=0.1\nboost=2.0",
    }
    found = recipe("tiny", json.dumps(wanted)).align  # some of them are only possible together
    assert (found.objective, found.signal, found.format, found.own_share, found.epochs) == (
        "ecpo",
        "hybrid",
        "random",
        0.25,
        2,
    )
    assert [rule.name for rule in found.industrial] == ["new"]
    assert recipe("tiny").align.signal == "exposures", "the nightly default needs no sampler"
