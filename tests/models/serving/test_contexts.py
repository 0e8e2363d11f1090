import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kserve import InferInput, InferRequest, InferResponse
from kserve.errors import InvalidInput

from features.histories.windows import Limits, Window
from models.serving.contexts import PATHWAYS, Contexts, from_request, from_response, to_request, to_response
from models.serving.protocol import Options, Prediction
from models.serving.recommender import Recommendation

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=5)
OPTIONS = st.builds(
    Options,
    num_items=st.integers(1, 100),
    beam_width=st.integers(1, 512),
    mode=st.just("sample"),
    temperature=st.floats(0.01, 100),
    exclude_seen=st.booleans(),
    seed=st.none() | st.integers(0, 2**63 - 1),
    num_samples=st.integers(1, 512),
    constrained=st.booleans(),
)


@st.composite
def windows(draw: st.DrawFn) -> Window:
    items = draw(st.lists(NAMES, max_size=4))
    n = len(items)
    numbers = st.lists(st.integers(0, 2**40), min_size=n, max_size=n)
    columns = {name: np.array(draw(numbers), np.int64) for name in ("times", "play_ms", "duration_ms", "labels")}
    return Window(ids=np.arange(n), item_ids=np.array(items, object), **columns)


@st.composite
def contexts(draw: st.DrawFn) -> Contexts:
    rows = draw(st.integers(1, 3))
    return Contexts(
        static=np.array(
            draw(st.lists(st.lists(st.integers(0, 1023), min_size=8, max_size=8), min_size=rows, max_size=rows))
        ),
        windows={name: [draw(windows()) for _ in range(rows)] for name in PATHWAYS},
        times_ms=np.full(rows, draw(st.integers(946_684_800_000, 4_102_444_799_999))),
        exclude=[frozenset(draw(st.lists(NAMES, max_size=3))) for _ in range(rows)],
        options=draw(OPTIONS),
    )


@settings(max_examples=30)
@given(contexts(), st.integers(1, 600_000))
def test_contexts_survive_the_wire(asked: Contexts, timeout_ms: int) -> None:
    message = to_request(asked, "onerec", "r", timeout_ms).to_grpc()
    back, left = from_request(InferRequest.from_grpc(message))
    assert (left, back.options, back.exclude) == (timeout_ms, asked.options, asked.exclude)
    assert np.array_equal(back.static, asked.static)
    assert np.array_equal(back.times_ms, asked.times_ms)
    assert back.windows == asked.windows


@pytest.mark.parametrize("push", [None, 0, 3])
def test_predictions_survive_the_wire(push: int | None) -> None:
    rng = np.random.default_rng(0)

    def some(n: int) -> Recommendation:
        numbers = rng.random((n, 3)).astype(np.float32)
        sids = rng.integers(0, 8192, (n, 3)).astype(np.int32)
        return Recommendation(item_ids=[f"ï{k}" for k in range(n)], scores=numbers.sum(1), sids=sids, log_probs=numbers)

    prediction = Prediction(
        model_version="v", recommendations=[some(2), some(0), some(5)], flags=["x", "y"], push=push, queue_s=0.25
    )
    request = to_request(_one(), "onerec", "r", 1000)
    message = to_response(prediction, InferRequest.from_grpc(request.to_grpc()), "onerec").to_grpc()
    back = from_response(InferResponse.from_grpc(message))
    assert (back.model_version, back.flags, back.push, back.queue_s) == ("v", ["x", "y"], push, 0.25)
    for one, two in zip(prediction.recommendations, back.recommendations, strict=True):
        assert one.item_ids == two.item_ids
        for name in ("scores", "sids", "log_probs"):
            assert np.array_equal(getattr(one, name), getattr(two, name))


def _one(**changes: object) -> Contexts:
    window = Window(
        ids=np.arange(2), item_ids=np.array(["i1", "i2"], object), **{n: np.arange(2) for n in ("times", "play_ms")},
        duration_ms=np.arange(2), labels=np.arange(2),
    )  # fmt: skip
    return Contexts(
        static=np.zeros((1, 8), np.int64),
        windows={name: [window] for name in PATHWAYS},
        times_ms=np.array([1_700_000_000_000]),
        exclude=[frozenset()],
        options=Options(),
    )


@pytest.mark.parametrize(
    ("name", "shape", "data", "said"),
    [
        ("static", [1, 7], [0] * 7, "expected 1 to 128 rows of 8"),
        ("static", [1, 8], [-1] * 8, "buckets"),
        ("time_ms", [1], [5], "2000 to 2099"),
        ("time_ms", [0], [], "1 to 128 rows"),
        ("short_counts", [1], [3], "add up to 3"),
        ("short_events", [1, 4], [0] * 4, "short_events has shape"),
        ("short_events", [2, 3], [0] * 6, "short_events has shape"),
        ("lifelong_items", [2], ["i1", "i2"], "2 rows"),
    ],
)
def test_wrong_contexts_are_refused_with_a_sentence(name: str, shape: list[int], data: list, said: str) -> None:
    request = to_request(_one(), "onerec", "r", 1000)
    kind = "BYTES" if name.endswith("items") else "INT64"
    request.inputs = [InferInput(name, shape, kind, data) if each.name == name else each for each in request.inputs]
    with pytest.raises(InvalidInput, match=said):
        from_request(request)
    request.inputs = [each for each in request.inputs if each.name != name]
    with pytest.raises(InvalidInput, match="expected"):
        from_request(request)


def test_the_length_of_a_context_is_what_the_model_keeps_of_it() -> None:
    assert _one().longest(Limits(short=1, positive=5, lifelong=2)) == 5
