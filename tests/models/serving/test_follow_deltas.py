"""The real server follows the catalogue: a new item is servable, a blocked one gone, later versions included."""

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from features import catalog, deltas
from features.schema import ITEM, conform
from features.storage import Storage
from models.bundle import publish, set_alias
from models.deltas import catch_up, catch_up_served

TIME = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture(scope="module")
def storage(new_bucket: Callable[[], Storage]) -> Storage:
    return new_bucket()


@pytest.fixture(scope="module")
def version(storage: Storage, write_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    made = publish(storage, write_bundle(tmp_path_factory.mktemp("bundle") / "a"), data_time=TIME)
    set_alias(storage, "production", made)
    return made


@pytest.fixture(scope="module")
def server(
    start_model_server: Any,
    storage: Storage,
    version: str,
    keys: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    # Taken down before anybody was served: not even the first answer may show it.
    deltas.block(storage, ["i2"])
    environment = keys | {"redis": "127.0.0.1:9"}
    with start_model_server(tmp_path_factory.mktemp("server"), storage, environment, "onerec=production") as running:
        running.serving(version)
        yield running


def shown(server: Any) -> set[str]:
    answer = server.infer(["u"], num_items=100, beam_width=512).json()
    (names,) = [output["data"] for output in answer["outputs"] if output["name"] == "item_ids"]
    return set(names)


def everything(server: Any) -> set[str]:
    """All items that can be shown: a list holds at most a hundred, so it is asked twice."""
    first = shown(server)
    inputs = [{"name": "exclude", "datatype": "BYTES", "shape": [1, len(first)], "data": sorted(first)}]
    answer = server.infer(["u"], inputs=inputs, num_items=100, beam_width=512).json()
    (names,) = [output["data"] for output in answer["outputs"] if output["name"] == "item_ids"]
    return (first | set(names)) - {""}


def test_a_new_item_is_servable_and_a_blocked_one_gone_within_seconds(
    server: Any, storage: Storage, version: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    assert "i2" not in everything(server)
    assert len(everything(server)) == 119
    items = pa.table({"item_id": ["new"], "duration_ms": [8_000], "tags": [["t1"]], "author_id": ["a1"]})
    began = time.monotonic()
    catalog.append_items(storage, conform(items, ITEM))
    assert catch_up_served(storage, tmp_path) == {version: 1}
    server.wait(lambda: "new" in everything(server))
    record_property("servable_s", time.monotonic() - began)
    began = time.monotonic()
    deltas.block(storage, ["i5"])
    server.wait(lambda: "i5" not in everything(server))
    record_property("gone_s", time.monotonic() - began)
    status = server.status()["models"]["onerec"]
    assert (status["items"], status["appended"], status["blocked"], status["deltas"]) == (121, 1, 2, 3)
    assert status["reason"] == ""
    metrics = server.client.get("/metrics").text
    assert 'onerec_catalogue_items{kind="blocked",model="onerec"} 2.0' in metrics


def test_requests_never_fail_and_never_show_a_blocked_item_while_the_catalogue_moves(
    server: Any, storage: Storage
) -> None:
    deltas.block(storage, ["i9"])
    server.wait(lambda: "i9" not in everything(server))
    for round_ in range(6):
        deltas.block(storage, [f"i{20 + round_}"])
        for _ in range(6):
            answer = server.infer(["u", "w"], num_items=100, beam_width=256)
            assert answer.status_code == 200
            assert '"i9"' not in answer.text


def test_take_downs_survive_the_next_version_and_a_damaged_delta_is_reported(
    server: Any, storage: Storage, write_bundle: Any, tmp_path: Path
) -> None:
    following = publish(storage, write_bundle(tmp_path / "b", seed=5), data_time=TIME + timedelta(days=1))
    catch_up(storage, following, tmp_path / "cache")
    set_alias(storage, "production", following)
    server.serving(following)
    found = everything(server)
    assert not {"i2", "i5", "i9"} & found
    assert "new" in found
    key = f"catalog/{following}/000099-0123456789abcdef.parquet"
    storage.put(key, b"nonsense")
    server.wait(lambda: "000099" in server.status()["models"]["onerec"]["reason"])
    assert everything(server) == found
    storage.remove(key)
    server.wait(lambda: server.status()["models"]["onerec"]["reason"] == "")
    deltas.unblock(storage, ["i5"])
    server.wait(lambda: "i5" in everything(server))
