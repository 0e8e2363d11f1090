import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from kserve import InferInput, InferRequest

from features.online import FeaturesUnavailable
from models.serving.lookup import FeatureLookup, Found, Remembered

TIMES = np.array([1_767_312_000_000])


def lookup(store: Any, **options: Any) -> FeatureLookup:
    return FeatureLookup(lambda: store, ThreadPoolExecutor(1), **{"budget_s": 30.0, **options})


def test_known_and_unknown_users(store: Any) -> None:
    found = asyncio.run(lookup(store).users(["a", "stranger"], np.repeat(TIMES, 2)))
    assert found.users[0] is store.users["a"]
    assert found.flags == ["", "cold_user"]
    assert found.told == {"cold_user"}


def test_concurrent_look_ups_share_a_read_and_get_their_own_users(store: Any) -> None:
    async def main() -> list[Found]:
        store.delay_s = 0.05
        looking = lookup(store)
        return await asyncio.gather(*(looking.users([name], TIMES) for name in "abcabc"))

    found = asyncio.run(main())
    assert [each.users[0].user_id for each in found] == list("abcabc")
    assert len(store.reads) < 6


def test_a_slow_store_is_not_waited_for_and_what_it_says_late_is_remembered(store: Any) -> None:
    async def main() -> list[Found]:
        looking = lookup(store, budget_s=0.05)
        store.delay_s = 0.4
        late = await looking.users(["a"], TIMES)
        behind = await looking.users(["a"], TIMES)  # nobody waits behind a look-up that is overdue
        assert len(store.reads) == 1
        await asyncio.sleep(0.5)
        later = await looking.users(["a"], TIMES)
        return [late, behind, later]

    late, behind, later = asyncio.run(main())
    assert late.told == behind.told == {"features_unavailable"}
    assert late.users == behind.users == [None]
    assert later.told == {"features_unavailable", "cached_context"}
    assert later.users == [store.users["a"]]


def test_a_broken_store_is_left_alone_for_a_moment_and_the_last_context_stands_in(store: Any) -> None:
    async def main() -> list[Found]:
        looking = lookup(store)
        good = await looking.users(["a"], TIMES)
        store.error = FeaturesUnavailable("Valkey does not answer")
        broken = await looking.users(["a", "b"], np.repeat(TIMES, 2))
        paused = await looking.users(["b"], TIMES)
        return [good, broken, paused]

    good, broken, paused = asyncio.run(main())
    assert good.told == set()
    assert broken.users == [store.users["a"], None]
    assert broken.flags == ["cached_context", "features_unavailable"]
    assert paused.told == {"features_unavailable"}
    assert len(store.reads) == 2


def test_a_caller_s_deadline_is_not_spent_on_waiting_for_features(store: Any) -> None:
    answering = threading.Event()

    class Silent:
        def read(self, user_ids: list[str], times_ms: np.ndarray) -> Any:
            answering.wait(60)
            return store.read(user_ids, times_ms)

    async def main() -> Found:
        try:
            return await asyncio.wait_for(lookup(Silent()).users(["a"], TIMES, time.monotonic() + 0.05), 20)
        finally:
            answering.set()

    assert asyncio.run(main()).told == {"features_unavailable"}


def test_what_cannot_be_read_costs_features_and_not_answers(store: Any) -> None:
    async def main() -> list[Found]:
        looking = lookup(store)
        store.error = KeyError("a column that no version of ours wrote")
        unreadable = await looking.users(["a"], TIMES)
        store.error = None
        return [unreadable, await looking.users(["b"], TIMES)]  # the store is not left alone for one bad value

    unreadable, after = asyncio.run(main())
    assert unreadable.told == {"features_unavailable"}
    assert after.users == [store.users["b"]]


def test_the_answer_says_so_and_is_the_remembered_context_s(store: Any, predictor: Any, caller: Any) -> None:
    async def main() -> list[dict[str, Any]]:
        model = caller(predictor(), store)
        tensors = [InferInput("user_id", [1], "BYTES", ["b"]), InferInput("time_ms", [1], "INT64", TIMES.tolist())]
        answers = [await model.predict(InferRequest("onerec", tensors))]
        store.error = FeaturesUnavailable("gone")
        answers.append(await model.predict(InferRequest("onerec", tensors)))
        return [{each.name: each.data for each in one.outputs} | one.parameters for one in answers]

    before, after = asyncio.run(main())
    assert (before["flags"], after["flags"]) == ("", "cached_context,features_unavailable")
    assert np.array_equal(before["item_ids"], after["item_ids"])


def test_memory_is_bounded_by_events_and_the_longest_unused_goes_first(make_user: Any) -> None:
    remembered = Remembered(50)
    users = [make_user(f"u{at}", [f"i{k}" for k in range(5)], at) for at in range(10)]  # 11 each
    remembered.put(users[:4])
    assert remembered.get("u0") is not None
    remembered.put(users[4:5])
    assert len(remembered) == 4
    assert remembered.get("u1") is None
    assert remembered.get("u0") is users[0]
    remembered.put([users[0]])
    assert len(remembered) == 4
    remembered.put([make_user("huge", [f"i{k}" for k in range(100)])])
    assert len(remembered) == 0
