import time

import numpy as np
import pytest
from kserve import InferInput, InferRequest
from kserve.errors import InvalidInput

from models.serving.forms import parse


def request(inputs: dict[str, tuple[str, list[int], list]] | None = None, **parameters: object) -> InferRequest:
    inputs = inputs if inputs is not None else {"user_id": ("BYTES", [1], ["u"])}
    tensors = [InferInput(name, shape, kind, data) for name, (kind, shape, data) in inputs.items()]
    return InferRequest("onerec", tensors, parameters=parameters)


USERS = ("BYTES", [2], ["a", "b"])


def test_defaults() -> None:
    query = parse(request())
    assert (query.user_ids, query.exclude) == (["u"], [frozenset()])
    assert (query.options.num_items, query.options.mode, query.options.exclude_seen) == (10, "beam", True)
    assert abs(query.times_ms[0] / 1000 - time.time()) < 60
    assert query.request_ids != parse(request()).request_ids


def test_all_fields_of_v2_and_v1_agree() -> None:
    v2 = parse(
        request(
            {
                "user_id": USERS,
                "time_ms": ("INT64", [2], [1_700_000_000_000, 1_700_000_000_001]),
                "request_id": ("BYTES", [2], [b"r1", "r2"]),
                "exclude": ("BYTES", [2, 2], ["i1", "i2", "i3", ""]),
            },
            num_items=7,
            beam_width=9,
            mode="sample",
            temperature="0.5",
            exclude_seen=False,
            seed=3,
        )
    )
    instances = [
        {"user_id": "a", "time_ms": 1_700_000_000_000, "request_id": "r1", "exclude": ["i1", "i2"]},
        {"user_id": "b", "time_ms": 1_700_000_000_001, "request_id": "r2", "exclude": ["i3"]},
    ]
    parameters = {
        "num_items": 7,
        "beam_width": 9,
        "mode": "sample",
        "temperature": 0.5,
        "exclude_seen": False,
        "seed": 3,
    }
    v1 = parse({"instances": instances, "parameters": parameters})
    assert np.array_equal(v1.times_ms, v2.times_ms)
    assert (v1.user_ids, v1.request_ids, v1.exclude, v1.options) == (
        v2.user_ids,
        v2.request_ids,
        v2.exclude,
        v2.options,
    )


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({}, "expected user_id"),
        ({"user_id": USERS, "more": USERS}, "expected user_id"),
        ({"user_id": ("BYTES", [0], [])}, "names 0 users"),
        ({"user_id": ("BYTES", [129], ["u"] * 129)}, "1 to 128"),
        ({"user_id": ("BYTES", [1], ["u" * 129])}, "longer than 128"),
        ({"user_id": ("BYTES", [1], [""])}, "empty"),
        ({"user_id": ("BYTES", [1], ["a\nb"])}, "control characters"),
        ({"user_id": ("BYTES", [1], ["\ud800"])}, "control characters"),
        ({"user_id": ("BYTES", [1], [b"\xff"])}, "not UTF-8"),
        ({"user_id": ("BYTES", [1], [5])}, "expected strings"),
        ({"user_id": ("BYTES", [1], [None])}, "expected strings"),
        ({"user_id": ("INT64", [1], [5])}, "expected BYTES"),
        ({"user_id": ("BYTES", [3], ["a", "b"])}, r"has 2 values; its shape \[3\] is of 3"),
        ({"user_id": ("BYTES", [1], ["a"] * 100_000)}, "has 100000 values"),
        ({"user_id": USERS, "request_id": ("BYTES", [2], ["r", "r"])}, "same request_id"),
        ({"user_id": ("BYTES", [2, 1], ["a", "b"])}, "1 dimension"),
        ({"user_id": ("BYTES", [-1], ["a"])}, "1 dimension"),
        ({"user_id": ("BYTES", [10**30], ["a"])}, "too large"),
        ({"user_id": USERS, "time_ms": ("INT64", [1], [1_700_000_000_000])}, "1 rows; user_id has 2"),
        ({"user_id": USERS, "time_ms": ("INT64", [2], [1_700_000_000, 1_700_000_000])}, "UTC milliseconds"),
        ({"user_id": USERS, "time_ms": ("FP32", [2], [1.5, 2.5])}, "expected INT64"),
        ({"user_id": USERS, "time_ms": ("INT64", [2], [1.5, 2.5])}, "not integers"),
        ({"user_id": USERS, "time_ms": ("INT64", [2], [2**70, 0])}, "do not make"),
        ({"user_id": USERS, "exclude": ("BYTES", [2], ["a", "b"])}, "2 dimension"),
        ({"user_id": ("BYTES", [2], [["a"], ["b", "c"]])}, "has 3 values"),
        ({"user_id": ("BYTES", [2], ["a", {"b": 1}])}, "expected strings"),
    ],
)
def test_wrong_inputs_are_explained(inputs: dict, sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        parse(request(inputs))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("num_items", [0, 101, -1, 2.0, "5", True]),
        ("beam_width", [0, 513, 1.5]),
        ("temperature", [0, -1, "hot", float("nan"), float("inf"), True]),
        ("mode", ["best", 1]),
        ("exclude_seen", ["yes", 1]),
        ("seed", [-1, 2**63]),
        ("num_item", [5]),
    ],
)
def test_wrong_parameters_are_explained(name: str, values: list) -> None:
    for value in values:
        with pytest.raises(InvalidInput, match=f"{name}.*expected"):
            parse(request(**{name: value}))


@pytest.mark.parametrize(
    "body",
    [
        [],
        "text",
        {},
        {"instances": "u"},
        {"instances": []},
        {"instances": [5]},
        {"instances": [5] * 1_000_000},
        {"instances": [{"user_id": "u", "request_id": "r"}, {"user_id": "v", "request_id": "r"}]},
        {"instances": [{"user": "u"}]},
        {"instances": [{"user_id": "u", "when": 1}]},
        {"instances": [{"user_id": "u", "time_ms": 1.5}]},
        {"instances": [{"user_id": "u", "time_ms": True}]},
        {"instances": [{"user_id": "u", "exclude": "i"}]},
        {"instances": [{"user_id": "u", "exclude": [1]}]},
        {"instances": [{"user_id": "u", "request_id": 7}]},
        {"instances": ["u"], "parameters": [1]},
        {"instances": ["u"], "parameters": {"num_items": 0}},
    ],
)
def test_wrong_v1_bodies_are_refused(body: object) -> None:
    with pytest.raises(InvalidInput):
        parse(body)
