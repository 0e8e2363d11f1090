"""The collector under requests that nobody should send: it answers all of them as documented, and lives on."""

import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from features.intake.api import Api
from features.intake.intake import Intake, IntakeConfig
from features.intake.upload import Outcome
from features.intake.wal import Segment, WalLimits

TIME = 1_651_363_200_123
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
TOKENS = ["Bearer server", "Bearer client", "Bearer ", "bearer  server ", "Basic c2VydmVy", "", "Bearer \xff\xfe"]


def quick(examples: int) -> hypothesis.settings:
    return hypothesis.settings(max_examples=examples, suppress_health_check=list(HealthCheck))


def nowhere(segments: Sequence[Segment]) -> Outcome:
    return Outcome(events={}, rejected=0)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    limits = WalLimits(segment_seconds=0.02)
    config = IntakeConfig(wal=tmp_path_factory.mktemp("wal"), limits=limits, upload_linger_s=0.0)
    intake = Intake(config, nowhere)
    yield Api(intake, client_token="client", server_token="server")
    intake.close()


@pytest.fixture(scope="module")
def url(api: Api) -> Iterator[str]:
    """The same behind a real HTTP server."""
    server = uvicorn.Server(uvicorn.Config(api, port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def alive(url: str) -> bool:
    return bool(httpx.get(f"{url}/healthz", timeout=10).json() == {"alive": True})


def fuzz_operations(url: str, examples: int) -> None:
    """Requests made from the OpenAPI page, those that fit it and those that do not."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for found in schema.get_all_operations():
        operation = found.ok()
        modes = [GenerationMode.POSITIVE] + [GenerationMode.NEGATIVE] * (operation.method == "post")
        cases = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes))

        @quick(examples)
        @given(cases, st.sampled_from(TOKENS))
        def run(case: Any, token: str) -> None:
            case.headers["Authorization"] = token
            response = case.call()
            assert response.status_code != 500
            case.validate_response(response, checks=CHECKS)

        run()


event = st.fixed_dictionaries(
    {"kind": st.sampled_from(["impression", "feedback", "served", "click"])},
    optional={
        "exposure_id": st.text(max_size=3) | st.just("x" * 10_000),
        "request_id": st.just("r"),
        "user_id": st.just("u") | st.integers(),
        "item_id": st.just("i") | st.none(),
        "position": st.integers(),
        "event_time": st.integers() | st.just(TIME) | st.datetimes().map(str) | st.just("2026-01-01T00:00:00Z"),
        "source": st.sampled_from(["onerec", "elsewhere"]),
        "duration_ms": st.integers() | st.floats(),
        "play_ms": st.integers(-5, 5) | st.just(10**400),
        "sid": st.lists(st.integers(0, 9), max_size=3),
        "log_probs": st.lists(st.floats(), max_size=3),
        "model_version": st.just("m"),
    },
)
batches = st.lists(event, max_size=3).map(lambda events: json.dumps({"events": events}).encode())
nested = st.integers(1, 200_000).map(lambda depth: b'{"events":' + b"[" * depth)


def fuzz_bodies(url: str, examples: int) -> None:
    """Bodies of any bytes, and batches with wrong fields."""
    bodies = st.one_of(batches, nested, st.binary(max_size=200), batches.map(lambda body: body[:-1] + b'"\xff"}'))
    with httpx.Client(headers={"Authorization": "Bearer server"}, timeout=30) as client:

        @quick(examples)
        @given(bodies)
        def run(body: bytes) -> None:
            answer = client.post(f"{url}/v1/events", content=body)
            assert answer.status_code in (202, 422)
            if answer.status_code == 422:
                assert answer.json()["error"]
                assert answer.json()["reason"] in ("malformed", "invalid")

        run()
    assert alive(url)


heads = st.sampled_from(
    [
        b"POST /v1/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer server\r\n",
        b"POST /v1/events HTTP/1.0\r\n",
        b"GET /v1/events HTTP/1.1\r\nHost: x\r\n",
        b"BREW /v1/events HTTP/1.1\r\n",
        b"\x16\x03\x01",
        b"",
    ]
)
fields = st.sampled_from(
    [
        b"Content-Length: 5\r\n\r\n",
        b"Content-Length: -1\r\n\r\n",
        b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nabc",
        b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n",
        b"X: " + b"y" * 100_000 + b"\r\n\r\n",
        b"\r\n",
    ]
)


def fuzz_sockets(url: str, examples: int) -> None:
    """Broken HTTP, and clients that hang up in the middle."""
    address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))

    @quick(examples)
    @given(heads, fields, st.binary(max_size=30))
    def run(head: bytes, rest: bytes, body: bytes) -> None:
        with socket.create_connection(address, timeout=30) as connection:
            answer = b""
            try:
                connection.sendall(head + rest + body)
                connection.shutdown(socket.SHUT_WR)
                while data := connection.recv(65536):
                    answer += data
            except TimeoutError:
                raise AssertionError("the collector neither answers nor hangs up") from None
            except OSError:
                pass  # it may hang up on such requests at any moment
            assert b" 500 " not in answer.split(b"\r\n")[0]

    run()
    assert alive(url)


def test_requests_made_from_the_openapi_page_are_answered_as_it_says(url: str) -> None:
    fuzz_operations(url, 25)


def test_any_body_is_accepted_or_refused(url: str) -> None:
    fuzz_bodies(url, 150)


def test_broken_http_does_not_stop_the_collector(url: str) -> None:
    fuzz_sockets(url, 60)


@pytest.mark.long
def test_ten_minutes_of_it(url: str) -> None:
    until = time.monotonic() + 600
    while time.monotonic() < until:
        fuzz_operations(url, 500)
        fuzz_bodies(url, 3000)
        fuzz_sockets(url, 1000)


def test_the_page_describes_itself_without_a_network(url: str) -> None:
    page = httpx.get(f"{url}/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "/v1/events" in page.text
    assert "http://" not in page.text
    assert "https://" not in page.text
    schemas = httpx.get(f"{url}/openapi.json").json()["components"]["schemas"]
    assert {"Impression", "Feedback", "Served"} <= set(schemas)


def test_other_methods_and_paths_are_named(url: str) -> None:
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        answer = httpx.request(method, f"{url}/v1/events")
        assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")
    assert httpx.get(f"{url}/nowhere").status_code == 404


def test_a_hundred_megabytes_are_not_read(url: str) -> None:
    """Declared or not, the collector hangs up after 4 MiB."""
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1024 * 1024
            yield b" " * 1024 * 1024

    headers = {"Authorization": "Bearer server"}
    for size in ({}, {"Content-Length": str(100 * 1024 * 1024)}):
        sent = 0
        try:
            answer = httpx.post(f"{url}/v1/events", content=chunks(), headers=headers | size, timeout=30)
            assert (answer.status_code, answer.json()["reason"]) == (413, "too_large")
        except (httpx.WriteError, httpx.ReadError):
            pass  # it hung up while we still sent
        assert sent < 50 * 1024 * 1024
    assert alive(url)


def test_a_body_that_never_comes_is_given_up(api: Api, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("features.intake.api.BODY_TIMEOUT_S", 0.1)
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer server\r\nContent-Length: 9\r\n\r\n{"
        )
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")
