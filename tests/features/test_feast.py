"""Feast comes in without run-time checks of its arguments, and everybody else's checks stay."""

import pytest
import typeguard

from features.feast import Entity, FeatureView, PushSource


@pytest.mark.parametrize("made", [Entity, FeatureView, PushSource])
def test_feast_is_not_compiled_anew(made: type) -> None:
    called = made.__init__.__code__.co_names  # type: ignore[misc]
    assert not [name for name in called if name.startswith("check_")]


def test_the_checks_of_others_stay() -> None:
    @typeguard.typechecked
    def double(value: int) -> int:
        return 2 * value

    assert double(2) == 4
    with pytest.raises(typeguard.TypeCheckError):
        double("2")  # type: ignore[arg-type]
