import asyncio
import logging
import uuid
from types import SimpleNamespace

import pytest
from kserve.errors import InvalidInput, ModelNotFound, ModelNotReady
from prometheus_client import REGISTRY

from models.serving.logs import REQUEST_ID
from models.serving.telemetry import Telemetry, request_id_of, status_of


@pytest.fixture
def telemetry() -> Telemetry:
    """Of a model that no other test has."""
    return Telemetry(uuid.uuid4().hex)


def value(name: str, telemetry: Telemetry, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, {"model": telemetry.model, **labels}) or 0.0


class Full(RuntimeError):
    status = 429


def test_a_request_is_in_flight_counted_timed_and_logged(
    telemetry: Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with telemetry.request("r-7") as trace:
        assert value("onerec_in_flight_requests", telemetry) == 1
        assert REQUEST_ID.get() == "r-7"
        with trace.stage("parse"):
            pass
        trace.took("model", 0.25)
        trace.version, trace.users, trace.beams = "v", 2, 64
    assert REQUEST_ID.get() == ""
    assert value("onerec_in_flight_requests", telemetry) == 0
    assert value("onerec_requests_total", telemetry, status="200") == 1
    assert value("onerec_request_seconds_count", telemetry) == 1
    assert value("onerec_stage_seconds_sum", telemetry, stage="model") == 0.25
    assert value("onerec_beam_width_sum", telemetry) == 64
    fields = caplog.records[-1].fields  # type: ignore[attr-defined]
    assert fields.items() >= {"request_id": "r-7", "version": "v", "users": 2, "status": 200}.items()
    assert set(fields["ms"]) == {"parse", "model", "total"}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidInput("x"), 400),
        (ModelNotFound("x"), 404),
        (ModelNotReady("x"), 503),
        (Full(), 429),
        (asyncio.CancelledError(), 499),
        (ZeroDivisionError(), 500),
    ],
)
def test_the_outcome_of_a_failed_request_is_its_status(telemetry: Telemetry, error: BaseException, status: int) -> None:
    with pytest.raises(type(error)), telemetry.request("r"):
        raise error
    assert status_of(error) == status
    assert value("onerec_requests_total", telemetry, status=str(status)) == 1
    assert value("onerec_request_seconds_count", telemetry) == 0
    assert value("onerec_in_flight_requests", telemetry) == 0


def test_requests_at_the_same_time_keep_their_own_ids(telemetry: Telemetry) -> None:
    async def one(name: str) -> None:
        with telemetry.request(name):
            await asyncio.sleep(0.001)
            assert REQUEST_ID.get() == name

    async def all_of_them() -> None:
        await asyncio.gather(*(one(f"r{number}") for number in range(20)))

    asyncio.run(all_of_them())
    assert value("onerec_requests_total", telemetry, status="200") == 20


def test_the_request_id_is_the_clients_when_it_can_be_written_down() -> None:
    assert request_id_of(SimpleNamespace(id="body"), {"x-request-id": "header"}) == "header"
    assert request_id_of(SimpleNamespace(id="body"), None) == "body"
    for bad in ("a\nb", "x" * 129, ""):
        assert len(request_id_of(SimpleNamespace(id=bad), {})) == 32
    assert request_id_of({}, {}) != request_id_of({}, {})


def test_one_version_is_in_service_at_a_time(telemetry: Telemetry) -> None:
    telemetry.serving("one", None)
    telemetry.serving("two", "one")
    assert value("onerec_bundle_serving", telemetry, version="one") == 0
    assert value("onerec_bundle_serving", telemetry, version="two") == 1
    telemetry.serving("two", "two")  # the same again, as after its deltas
    assert value("onerec_bundle_serving", telemetry, version="two") == 1


def test_legality_is_sampled_once_a_minute(telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter((0.0, 1.0, 59.0, 61.0, 62.0, 122.0))
    monkeypatch.setattr("models.serving.telemetry.time", SimpleNamespace(monotonic=lambda: next(moments)))
    assert [telemetry.legality_due() for _ in range(6)] == [True, False, False, True, False, True]
