"""What a run trains on when it is not told: the newest of what is stored, chosen once."""

from datetime import UTC, datetime

import pytest

from features.intake import exposures as exposure_store
from features.snapshot import EmptyWindow
from features.storage import Storage
from models import window
from models.bundle import content_digest
from models.window import NoBase, prepare_all, prepare_newest, stored_hours

NOTHING = {"start": "", "reference_start": "", "current_start": "", "end": ""}
EMPTY = content_digest({})[:8]
VERSION, OTHER = f"20260101T000000-{EMPTY}", f"20260102T000000-{EMPTY}"


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What would be frozen; freezing itself is tested with ``features.snapshot``."""
    asked: list[tuple[str, ...]] = []

    def prepare(*given: str) -> str:
        asked.append(given)
        return "digest"

    monkeypatch.setattr(window, "prepare", prepare)
    return asked


def store(s3: Storage, *hours: str) -> None:
    for hour in hours:
        day, number = hour.split("T")
        s3.put(f"{exposure_store.ROOT}/date={day}/hour={number}/{'0' * 64}.parquet", b"")


def in_production(s3: Storage, version: str) -> None:
    manifest = {"version": version, "files": {}}
    s3.put_json(f"models/onerec/{version}/manifest.json", manifest)
    s3.put_json("models/onerec/aliases/production.json", {"version": version})


@pytest.mark.usefixtures("environment")
def test_the_newest_hours_are_chosen_once(s3: Storage, prepared: list[tuple[str, ...]]) -> None:
    store(s3, "2026-01-10T05", "2026-01-30T23")
    in_production(s3, VERSION)
    chosen, digest = prepare_newest("r1", NOTHING, base="production", targets="new")
    assert digest == "digest"
    assert chosen == {
        "start": "2026-01-10T00:00:00+00:00",
        "reference_start": "2026-01-28T00:00:00+00:00",
        "current_start": "2026-01-30T00:00:00+00:00",
        "end": "2026-01-31T00:00:00+00:00",
        "base": VERSION,
    }
    store(s3, "2026-02-03T00")
    in_production(s3, OTHER)
    assert prepare_newest("r1", NOTHING, base="production", targets="new")[0] == chosen, "a retry does the same"
    assert prepare_newest("r2", NOTHING, base="production", targets="new")[0]["end"].startswith("2026-02-03T01")
    assert prepared[0] == ("r1", chosen["start"], chosen["end"], chosen["reference_start"])


@pytest.mark.usefixtures("environment")
def test_training_from_scratch_is_compared_with_what_is_in_production_when_it_begins(
    s3: Storage, prepared: list[tuple[str, ...]]
) -> None:
    store(s3, "2026-01-10T05")
    window = {"start": "2026-01-10T00:00:00+00:00", "end": "2026-01-11T00:00:00+00:00"}
    assert prepare_all("r1", **window, against="production")[0] == {**window, "base": ""}
    in_production(s3, VERSION)
    assert prepare_all("r1", **window, against="production")[0]["base"] == "", "a retry compares as it did"
    assert prepare_all("r2", **window, against="production")[0]["base"] == VERSION
    assert prepare_all("r3", **window)[0]["base"] == ""


@pytest.mark.usefixtures("environment")
def test_an_alias_of_a_bundle_that_is_gone(s3: Storage, prepared: list[tuple[str, ...]]) -> None:
    store(s3, "2026-01-10T05")
    in_production(s3, VERSION)
    s3.remove(f"models/onerec/{VERSION}/manifest.json")
    with pytest.raises(NoBase, match=f"'production' points at {VERSION}: there is no complete bundle"):
        prepare_newest("r1", NOTHING, base="production", targets="new")
    assert prepared == []


@pytest.mark.usefixtures("environment")
def test_what_is_given_is_kept(s3: Storage, prepared: list[tuple[str, ...]]) -> None:
    given = {name: f"2026-01-0{day}T00:00:00+00:00" for day, name in enumerate(NOTHING, 1)}
    chosen, _ = prepare_newest("r1", given, base=VERSION, targets="all")
    assert chosen == {**given, "base": VERSION}
    assert prepared == [("r1", given["start"], given["end"], given["start"])]
    assert list(s3.keys("runs/")) == [], "nothing was chosen, so nothing is kept"


@pytest.mark.usefixtures("environment")
def test_everything_that_is_stored(s3: Storage, prepared: list[tuple[str, ...]]) -> None:
    store(s3, "2026-01-10T05", "2026-01-11T07")
    assert stored_hours(s3) == (datetime(2026, 1, 10, 5, tzinfo=UTC), datetime(2026, 1, 11, 8, tzinfo=UTC))
    prepare_all("r1", start="", end="")
    start = "2026-01-10T05:00:00+00:00"
    assert prepared == [("r1", start, "2026-01-11T08:00:00+00:00", start)]


@pytest.mark.usefixtures("environment")
def test_one_clock_that_is_wrong_is_not_everybodys_newest_day(s3: Storage) -> None:
    """Unless the whole log lies there: a replayed or invented one has a time of its own."""
    store(s3, "2026-01-10T05", "2026-01-11T07", "2031-07-01T00")
    now = datetime(2026, 1, 11, 8, tzinfo=UTC)
    assert exposure_store.stored_hours(s3, now) == (datetime(2026, 1, 10, 5, tzinfo=UTC), now)
    past = datetime(2020, 1, 1, tzinfo=UTC)
    assert exposure_store.stored_hours(s3, past) == (
        datetime(2026, 1, 10, 5, tzinfo=UTC),
        datetime(2031, 7, 1, 1, tzinfo=UTC),
    )


@pytest.mark.usefixtures("environment")
def test_nothing_to_choose_from(s3: Storage) -> None:
    with pytest.raises(EmptyWindow, match="ingest a log first"):
        prepare_all("r1", start="", end="")
    store(s3, "2026-01-10T05")
    with pytest.raises(NoBase, match="alias 'production' points at nothing; run the training pipeline first"):
        prepare_newest("r1", NOTHING, base="production", targets="new")
    with pytest.raises(ValueError, match="give 'new' or 'all'"):
        prepare_newest("r1", NOTHING, base="", targets="some")
