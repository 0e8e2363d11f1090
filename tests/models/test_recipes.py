import pytest

from models.presets import recipe
from models.sizes import PRESETS, preset
from models.training.config import LAW


@pytest.mark.parametrize("name", PRESETS)
def test_overrides_change_what_they_name_and_nothing_else(name: str) -> None:
    plain, changed = recipe(name), recipe(name, '{"pretrain.epochs": 9, "dropout": 0.25}')
    assert (changed.pretrain.epochs, changed.dropout) == (9, 0.25)
    assert changed.align == plain.align
    assert changed.incremental == plain.incremental


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("[1]", "expected a JSON object"),
        ("nope", "not a JSON object"),
        ('{"pretrain.epoch": 1}', "no field 'pretrain.epoch'"),
        ('{"preset": "small"}', "no field 'preset'"),
        ('{"pretrain.epochs": "many"}', "'pretrain.epochs' cannot be 'many': Input should be a valid integer"),
        ('{"pretrain.epochs": 1.5}', "'pretrain.epochs' cannot be 1.5: Input should be a valid integer"),
        ('{"align.epochs": true}', "'align.epochs' cannot be True: Input should be a valid integer"),
        ('{"dropout": "high"}', "'dropout' cannot be 'high': Input should be a valid number"),
        ('{"dropout": NaN}', "'dropout' cannot be nan: Input should be a finite number"),
        ('{"tokenizer.modalities": "text"}', "'tokenizer.modalities' cannot be 'text': Input should be a valid array"),
        ('{"align.objective": "best"}', "'align.objective' cannot be 'best': Input should be 'rsft', "),
        ('{"align.drop_sessions": 2}', "drop_sessions"),
    ],
)
def test_wrong_overrides_are_refused_with_what_was_given(overrides: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        recipe("tiny", overrides)


def test_values_of_the_right_kind_stay_as_they_were_given() -> None:
    """A stage's digest holds them: 0 must not become 0.0."""
    changed = recipe("tiny", '{"dropout": 0, "align.own_share": null, "tokenizer.modalities": ["text", "tags"]}')
    assert repr(changed.dropout) == "0"
    assert changed.align.own_share is None
    assert list(changed.tokenizer.modalities) == ["text", "tags"]


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="tiny, small"):
        preset("huge", codes=64)


def test_the_model_is_as_wide_as_the_codebooks_it_starts_from() -> None:
    for name in PRESETS:
        assert preset(name, codes=64).embed == recipe(name).tokenizer.dim


def test_published_sizes_train_by_the_law_and_once_through_the_data() -> None:
    big, small = recipe("v2-1b"), recipe("small")
    assert (big.pretrain.learning_rate, big.pretrain.epochs, big.dropout) == (LAW, 1, 0.0)
    assert big.incremental == big.pretrain
    assert small.pretrain.learning_rate > small.incremental.learning_rate > 0
