"""Commands that fail end with a clean message, whatever they raise."""

import pytest
import typer
from typer.testing import CliRunner

from features.storage import StorageUnavailable
from pipelines.cli import CleanErrors, fail, main
from pipelines.stack import StackError

FAILURES: dict[str, BaseException] = {
    "ours": StorageUnavailable("S3 at 127.0.0.1:1 does not answer"),
    "hinted": StackError("not up", "start it"),
    "value": ValueError("the folder x holds no logs"),
    "missing": KeyError("user 7"),
    "strange": RuntimeError("boom [bold]"),
    "silent": AssertionError(),
    "path": PermissionError(13, "Permission denied", "/root/x"),
    "disk": OSError(28, "No space left on device"),
}


def command(error: BaseException | None) -> typer.Typer:
    app = typer.Typer(cls=CleanErrors, pretty_exceptions_enable=False)
    app.callback()(main)

    @app.command()
    def work() -> None:
        if error is not None:
            raise error
        fail("given [x]", "do y", code=2)

    return app


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ours", "error: S3 at 127.0.0.1:1 does not answer"),
        ("hinted", "error: not up\nhint: start it"),
        ("value", "error: the folder x holds no logs\nhint: `onerec --debug"),
        ("missing", "error: KeyError: user 7"),
        ("strange", "error: RuntimeError: boom [bold]"),
        ("silent", "error: AssertionError"),
        ("path", "error: /root/x cannot be used: Permission denied\nhint: give another path, or this user the right"),
        ("disk", "error: OSError: No space left on device\nhint: `onerec --debug"),
    ],
)
def test_message_of_an_error(name: str, words: str) -> None:
    result = CliRunner().invoke(command(FAILURES[name]), ["work"])
    assert result.exit_code == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in CliRunner().invoke(command(FAILURES[name]), ["--debug", "work"]).stderr


def test_fail_prints_message_hint_and_code() -> None:
    result = CliRunner().invoke(command(None), ["work"])
    assert (result.exit_code, result.stderr) == (2, "error: given [x]\nhint: do y\n")
