import io
import json
import logging
import threading
from collections.abc import Iterator

import pytest

from models.serving import logs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What the process would write to stderr; the root logger is as before afterwards."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield io.StringIO()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def test_a_line_is_one_json_object_with_the_id_of_its_request(stream: io.StringIO) -> None:
    listener = logs.configure_logging(stream)
    token = logs.REQUEST_ID.set("r-1")
    logging.getLogger("any.library").warning("two\nlines of %s", {"a": 1}, extra={"fields": {"users": 3, "at": {1}}})
    logs.REQUEST_ID.reset(token)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("ours").exception("failed")
    listener.stop()
    first, second = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (first["message"], first["request_id"], first["users"]) == ("two\nlines of {'a': 1}", "r-1", 3)
    assert (first["level"], first["logger"]) == ("WARNING", "any.library")
    assert "request_id" not in second
    assert "ValueError: broken" in second["error"]


def test_a_stuck_reader_costs_lines_and_not_requests(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    class Stuck(io.StringIO):
        def write(self, text: str) -> int:
            release.wait(30)
            return stream.write(text)

    monkeypatch.setattr(logs, "CAPACITY", 5)
    before = logs.LINES_LOST._value.get()
    listener = logs.configure_logging(Stuck())
    for number in range(50):  # returns although nobody reads
        logging.getLogger("any").warning("line %d", number)
    lost = logs.LINES_LOST._value.get() - before
    assert lost >= 40
    release.set()
    listener.stop()
    assert len(stream.getvalue().splitlines()) == 50 - lost


def test_libraries_handlers_are_taken_over(stream: io.StringIO) -> None:
    library = logging.getLogger("library.with.handler")
    own = io.StringIO()
    library.addHandler(logging.StreamHandler(own))
    library.propagate = False
    listener = logs.configure_logging(stream)
    library.warning("once")
    listener.stop()
    assert own.getvalue() == ""
    assert json.loads(stream.getvalue())["message"] == "once"
