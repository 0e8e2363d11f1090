"""The load generator against a server whose behaviour is known."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks.serving_load import Load, LoadConfig
from features.schema import exposure_id

Answer = Callable[[int, dict[str, Any]], tuple[float, bytes]]


class Stub:
    """Answers request n (from 0) with ``answer(n, body)``: seconds to wait, and raw bytes ("" hangs up)."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked = 0
        self.loop = asyncio.new_event_loop()
        self.server = self.loop.run_until_complete(asyncio.start_server(self.serve, "127.0.0.1", 0))
        self.port = self.server.sockets[0].getsockname()[1]
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0] or 0) if b"post" in head else 0
                body = await reader.readexactly(length)
                if not length:
                    writer.write(response(200, {}))
                    continue
                number, self.asked = self.asked, self.asked + 1
                seconds, raw = self.answer(number, json.loads(body))
                await asyncio.sleep(seconds)
                if not raw:
                    return
                writer.write(raw)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.end(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def end(self) -> None:
        self.server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


@pytest.fixture
def stub() -> Iterator[Callable[[Answer], Stub]]:
    made: list[Stub] = []

    def make(answer: Answer) -> Stub:
        made.append(Stub(answer))
        return made[-1]

    yield make
    for each in made:
        each.stop()


def response(status: int, body: dict[str, Any], *headers: str) -> bytes:
    data = json.dumps(body).encode()
    head = "\r\n".join((f"HTTP/1.1 {status} X", f"Content-Length: {len(data)}", *headers))
    return f"{head}\r\n\r\n".encode() + data


def run(port: int, **options: Any) -> dict[str, Any]:
    async def go() -> dict[str, Any]:
        return await Load(LoadConfig(port=port, **{"users": 4, **options})).run()

    return asyncio.run(go())


def test_arrivals_do_not_wait_for_the_server_and_latency_counts_from_the_intended_start(stub: Any) -> None:
    """One connection and a server that stalls once: whoever should have started meanwhile has waited."""
    server = stub(lambda number, body: (0.3 if number == 5 else 0.0, response(200, {})))

    async def go() -> tuple[dict[str, Any], list[float]]:
        load = Load(LoadConfig(port=server.port, users=4, rate=100.0, seconds=1.0, connections=1, slices=4, seed=1))
        return await load.run(), load.tally.latency

    found, latency = asyncio.run(go())
    assert 70 < found["asked"] < 130
    assert found["statuses"] == {"200": found["asked"]}
    assert sum(part["answered"] for part in found["slices"]) == found["asked"]
    # Some 30 requests fell into the stall, the first third of them waited long: a closed loop would have seen one.
    assert sum(seconds > 0.15 for seconds in latency) > 8


def test_refusals_breaks_and_timeouts_are_told_apart(stub: Any) -> None:
    kinds = {
        0: (0.0, response(200, {})),
        1: (0.0, response(429, {}, "Retry-After: 1")),
        2: (0.0, response(503, {})),
        3: (0.0, b""),
        4: (5.0, response(200, {})),
    }
    server = stub(lambda number, body: kinds[number % 5])
    found = run(server.port, rate=100.0, seconds=0.5, connections=50, timeout_s=0.5)
    assert set(found["statuses"]) == {"200", "429", "503", "0", "-1"}
    assert sum(found["statuses"].values()) == found["asked"]
    assert found["retry_after"] == found["statuses"]["429"]


def test_closed_loop_keeps_so_many_requests_in_flight(stub: Any) -> None:
    server = stub(lambda number, body: (0.05, response(200, {"flags": "features_unavailable"})))
    found = run(server.port, seconds=0.6, connections=5, warm_s=0.1, health=True)
    assert 0 < found["answered_per_second"] <= 101
    assert found["p50_ms"] >= 50
    assert found["without_features"] == server.asked
    assert found["health"]["max_ms"] > 0


def test_an_answer_of_two_versions_is_found(stub: Any) -> None:
    def answer(number: int, body: dict[str, Any]) -> tuple[float, bytes]:
        request = next(tensor["data"][0] for tensor in body["inputs"] if tensor["name"] == "request_id")
        told, used = ("old", "new") if number == 3 else ("new", "new")
        ids = [exposure_id(request, used, slot) for slot in range(3)]
        outputs = [{"name": "exposure_ids", "data": ids}]
        named = {"model_version": told, "parameters": {"model_version": told}, "outputs": outputs}
        return 0.0, response(200, named)

    server = stub(answer)
    found = run(server.port, rate=50.0, seconds=0.4, verify=True)
    assert found["mixed"] == 1
    assert found["versions"] == {"new": found["asked"] - 1, "old": 1}


def test_nobody_there_is_told(stub: Any) -> None:
    server = stub(lambda number, body: (0.0, b""))
    port = server.port
    server.loop.call_soon_threadsafe(server.server.close)
    found = run(port, rate=50.0, seconds=0.3)
    assert found["answered_per_second"] == 0
    assert set(found["statuses"]) == {"0"}
