"""The router in front of production and candidate: everybody is answered, always by the same model, in order."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from monitoring.experiment import Split
from pipelines.arms import RoutedArm
from pipelines.client import Served


@dataclass
class Named:
    """An arm that answers with its name, and remembers whom."""

    name: str
    asked: list[str] = field(default_factory=list)

    def recommend(
        self, user_ids: Sequence[str], times_ms: Sequence[int], request_ids: Sequence[str], num_items: int
    ) -> list[Served]:
        self.asked += user_ids
        rows = zip(user_ids, times_ms, request_ids, strict=True)
        return [
            Served(
                request_id=request,
                item_ids=[f"{user}@{time}"] * num_items,
                scores=[],
                sids=[],
                exposure_ids=[],
                model_version=self.name,
                flags=[],
            )
            for user, time, request in rows
        ]


@given(st.lists(st.text(min_size=1, max_size=4), max_size=30), st.floats(0.05, 0.95), st.text(max_size=3))
def test_each_user_is_answered_by_the_splits_model_in_place(users: list[str], share: float, salt: str) -> None:
    split, stable, canary = Split(share=share, salt=salt), Named("stable"), Named("canary")
    router = RoutedArm(stable=stable, canary=canary, split=split)
    requests = [f"r{row}" for row in range(len(users))]
    for _ in range(2):
        served = router.recommend(users, range(len(users)), requests, 2)
        assert [each.request_id for each in served] == requests
        assert [each.item_ids for each in served] == [[f"{user}@{row}"] * 2 for row, user in enumerate(users)]
        assert [each.model_version for each in served] == [split.arm(user) for user in users]
    assert not set(stable.asked) & set(canary.asked)
