from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.intake import exposures, partitions, retention
from features.intake.exposures import consume
from features.intake.retention import RetentionConfig, distinct, finished, main, prune
from features.runs import Run
from features.schema import EVENTS, EXPOSURE, FLAGS
from features.storage import Storage

DAY = datetime(2022, 5, 1, tzinfo=UTC)
T0 = int(DAY.timestamp() * 1000)
HOUR_MS = 3_600_000
AT_ONCE = RetentionConfig(grace=timedelta(0))


def exposure(name: str, hours: float = 0, **changes: Any) -> dict[str, Any]:
    row = {"exposure_id": name, "request_id": "r", "user_id": "u", "item_id": "i", "sid": None, "position": 0}
    row |= {"event_time": T0 + int(hours * HOUR_MS), "source": "organic", "model_version": None, "log_probs": None}
    return row | {"duration_ms": 9000, "play_ms": 0} | dict.fromkeys(FLAGS, False) | changes


def put(storage: Storage, *rows: dict[str, Any]) -> list[str]:
    return exposures.write(storage, pa.Table.from_pylist(list(rows), schema=EXPOSURE))


def served(name: str, log_prob: float = -1.0) -> dict[str, Any]:
    row = {"exposure_id": name, "request_id": "r", "user_id": "u", "item_id": "i", "sid": [1, 2], "position": 0}
    return row | {"model_version": "m", "log_probs": [log_prob, -2.0], "event_time": T0}


@settings(max_examples=50)
@given(st.lists(st.builds(served, st.sampled_from("abc"), st.sampled_from([-1.0, -0.25])), max_size=8), st.randoms())
def test_distinct_drops_repeats_alone_and_ignores_order(rows: list[dict[str, Any]], random: Any) -> None:
    again = rows + rows[:2]
    random.shuffle(again)
    once, twice = (distinct(pa.Table.from_pylist(r, schema=EVENTS["served"])) for r in (rows, again))
    assert once.equals(twice)
    assert once.num_rows == len({(row["exposure_id"], row["log_probs"][0]) for row in rows})


def test_an_hour_is_merged_first_and_its_old_parts_go_after_the_grace(s3: Storage) -> None:
    put(s3, exposure("a"), exposure("b"))
    put(s3, exposure("a", like=True), exposure("c"))
    put(s3, exposure("elsewhere", hours=5))
    before = exposures.read(s3)
    assert prune(s3, AT_ONCE, dry_run=True)["merged"] == 1
    assert len(list(s3.keys("exposures/"))) == 3
    done = prune(s3, AT_ONCE)
    assert (done["merged"], done["deleted"]) == (1, 0)
    assert prune(s3)["deleted"] == 0
    assert prune(s3, AT_ONCE, dry_run=True)["superseded"] == 2
    assert prune(s3, AT_ONCE)["deleted"] == 2
    assert len(list(s3.keys("exposures/"))) == 2
    assert exposures.read(s3).equals(before)
    assert prune(s3, AT_ONCE)["superseded"] == 0


def test_small_event_segments_become_one(s3: Storage) -> None:
    for names in ("ab", "bc", "a"):
        table = pa.Table.from_pylist([served(name) for name in names], schema=EVENTS["served"])
        partitions.write(s3, "events/kind=served", table)
    prune(s3, AT_ONCE)
    prune(s3, AT_ONCE)
    assert len(list(s3.keys("events/kind=served/"))) == 1
    assert exposures.read_events(s3, "served", None, None).column("exposure_id").to_pylist() == ["a", "b", "c"]


def test_what_an_unfinished_run_consumes_stays(s3: Storage) -> None:
    old = put(s3, exposure("old"))
    put(s3, exposure("new", hours=24 * 10))
    first = consume(s3, "run-1", DAY, DAY + timedelta(hours=1))
    assert first == old
    assert s3.get_json("manifests/consumed/run-1.json")["segments"] == old
    week = RetentionConfig(retention_days=7, grace=timedelta(0))
    done = prune(s3, week)
    assert (done["expired"], done["kept_for_runs"], done["deleted"]) == (1, 1, 0)

    s3.put_json("runs/run-1/gate/decision.json", {"blessed": True})
    assert not finished(Run(s3, "run-1"))
    assert prune(s3, week)["deleted"] == 0
    s3.put_json("runs/run-1/publish/done.json", {"digest": "d", "inputs": {}, "summary": {}})
    assert finished(Run(s3, "run-1"))
    assert prune(s3, week)["deleted"] == 1
    assert exposures.read(s3).column("exposure_id").to_pylist() == ["new"]


def test_what_a_run_claims_meanwhile_stays_and_is_not_counted_as_deleted(
    s3: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    (old,) = put(s3, exposure("old"))
    put(s3, exposure("new", hours=24 * 10))
    claims = retention.claims

    def then_claimed(*arguments: Any) -> set[str]:
        found = claims(*arguments)
        consume(s3, "run-1", DAY, DAY + timedelta(hours=1))
        return found

    monkeypatch.setattr(retention, "claims", then_claimed)
    done = prune(s3, RetentionConfig(retention_days=7))
    assert (done["expired"], done["kept_for_runs"], done["deleted"], done["bytes"]) == (1, 1, 0, 0)
    assert s3.exists(old)


def test_a_refused_or_abandoned_run_holds_nothing(s3: Storage) -> None:
    put(s3, exposure("old"))
    put(s3, exposure("new", hours=24 * 10))
    consume(s3, "refused", DAY, DAY + timedelta(hours=1))
    consume(s3, "abandoned", DAY, DAY + timedelta(hours=1))
    s3.put_json("runs/refused/gate/decision.json", {"blessed": False})
    assert prune(s3, RetentionConfig(retention_days=7))["deleted"] == 0
    assert prune(s3, RetentionConfig(retention_days=7, abandoned=timedelta(0)))["deleted"] == 1


def test_a_wrong_clock_does_not_make_everything_old(s3: Storage) -> None:
    put(s3, exposure("now"))
    put(s3, exposure("in the far future", hours=24 * 365 * 70))
    assert prune(s3, RetentionConfig(retention_days=7))["expired"] == 0
    assert exposures.read(s3).num_rows == 2


def test_a_reader_that_loses_a_part_finds_the_merge(s3: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    put(s3, exposure("a"))
    put(s3, exposure("b"))
    prune(s3, AT_ONCE)
    listed = partitions.parts

    def then_pruned(*arguments: Any) -> Any:
        found = listed(*arguments)
        monkeypatch.setattr(partitions, "parts", listed)
        assert prune(s3, AT_ONCE)["deleted"] == 2
        return found

    monkeypatch.setattr(partitions, "parts", then_pruned)
    assert exposures.read(s3).column("exposure_id").to_pylist() == ["a", "b"]


def test_bad_figures_and_an_absent_store_are_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from features.settings import settings as current

    monkeypatch.setenv("ONEREC_S3_ENDPOINT", "127.0.0.1:1")
    current.cache_clear()
    assert main(["--retention-days", "-1"]) == 1
    assert "-1.0 days cannot be kept; give more than 0" in capsys.readouterr().err
    assert main([]) == 1
    assert "127.0.0.1:1" in capsys.readouterr().err
    current.cache_clear()
