import numpy as np
import pyarrow as pa

from features.histories.requests import requests
from features.schema import EXPOSURE


def test_every_exposure_belongs_to_one_request(make_exposures) -> None:
    table = make_exposures(300)
    grouped = requests(table.take(np.random.default_rng(0).permutation(300)))
    assert sorted(grouped.rows.tolist()) == list(range(300))
    assert grouped.offsets[-1] == 300
    assert len(grouped) == len(set(table["request_id"].to_pylist()))
    assert (np.diff(grouped.times_ms) >= 0).all()


def test_a_request_takes_its_earliest_time_and_orders_by_position(make_exposures) -> None:
    table = make_exposures(300, users=2)
    grouped = requests(table)
    times = table["event_time"].cast(pa.int64()).to_numpy()
    position = table["position"].to_numpy()
    for request in range(len(grouped)):
        rows = grouped.rows_of(request)
        assert grouped.times_ms[request] == times[rows].min()
        assert (np.diff(position[rows]) >= 0).all()
        assert set(table["request_id"].take(rows).to_pylist()) == {grouped.request_ids[request]}
        assert set(table["user_id"].take(rows).to_pylist()) == {grouped.user_ids[request]}


def test_one_request_id_of_two_users_is_two_requests(make_exposures) -> None:
    table = make_exposures(40, users=2).drop_columns("request_id").append_column("request_id", pa.array(["same"] * 40))
    assert len(requests(table.select(EXPOSURE.names))) == 2


def test_no_exposures_no_requests() -> None:
    assert len(requests(EXPOSURE.empty_table())) == 0
