"""The comparison of architectures is fair: equal parameters, and never the data of another log."""

from dataclasses import replace

import pyarrow as pa
import pytest

from benchmarks.equal_loss import arms, fingerprint, layer_parameters
from features.datasets import Dataset
from features.schema import EXPOSURE, ITEM, USER, conform


def log(play_ms: int) -> Dataset:
    row = {"exposure_id": "e", "request_id": "r", "user_id": "u", "item_id": "i", "position": 0, "event_time": 0}
    flags = {field.name: False for field in EXPOSURE if field.type == pa.bool_()}
    row |= {"source": "organic", "duration_ms": 1000, "play_ms": play_ms, **flags}
    exposures = conform(pa.Table.from_pylist([row]), EXPOSURE)
    return Dataset(name="log", items=ITEM.empty_table(), users=USER.empty_table(), exposures=exposures)


@pytest.mark.parametrize("codes", [64, 256])
def test_rivals_have_equal_parameters(codes: int) -> None:
    found = {name: layer_parameters(config) for name, config in arms(codes, 3, 64).items()}
    shared = found.pop("lazy, one KV")
    assert max(found.values()) / min(found.values()) < 1.01
    assert shared < min(found.values())


def test_other_rows_are_other_data() -> None:
    assert fingerprint(log(5)) == fingerprint(log(5))
    assert fingerprint(log(5)) != fingerprint(log(6))


def test_chunks_of_a_table_do_not_matter() -> None:
    whole = log(5)
    twice = pa.concat_tables([whole.exposures, whole.exposures])
    apart, together = replace(whole, exposures=twice), replace(whole, exposures=twice.combine_chunks())
    assert fingerprint(apart) == fingerprint(together)
