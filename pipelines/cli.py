"""The frame of the `onerec` command: the application, shared options, output and errors.

Commands live in ``pipelines/cli_*.py``; each imports ``app`` from here, decorates its functions and is imported by
``pipelines.__main__``. Heavy libraries are imported inside the commands, so that `onerec --help` stays quick.
Results go to stdout (``--json``: one JSON document), progress and errors to stderr. Exit code 0, 1 (failed) or 2
(bad usage).
"""

import json
import os
import signal
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def _home(given: str | Path) -> Path:
    """``given`` as a home; an empty one is refused, since it would be the folder one happens to stand in."""
    if not str(given).strip():
        raise typer.BadParameter("it is empty; give a folder, such as .onerec")
    if Path(given).is_file():
        raise typer.BadParameter(f"{given} is a file; give a folder, such as .onerec")
    return Path(given)


Home = Annotated[
    Path,
    typer.Option(
        "--home",
        envvar="ONEREC_HOME",
        parser=_home,
        metavar="FOLDER",
        help="Folder of the local platform: state, logs and data.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")]

HOME = Path(".onerec")
MAX_USER = 128
"""Characters of a user id, as the model server takes them."""


def fail(message: str, hint: str = "", code: int = 1) -> NoReturn:
    """Ends the command with a clean error: what is wrong, and what to do about it."""
    err.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    if hint:
        err.print(f"[bold]hint:[/] {escape(hint)}", soft_wrap=True)
    raise typer.Exit(code)


def emit(value: Any) -> None:
    """Prints ``value`` as one JSON document on stdout; paths, times and the like become strings."""
    print(json.dumps(value, indent=1, default=str))


def check_log(path: Path, columns: str = "", *, played: bool = False) -> None:
    """Ends the command, with code 2, unless ``path`` holds a log that can be learned from: before anything starts.

    ``columns`` is the map of a log in no known layout; with ``played`` the log must have play times.
    """
    from features.datasets import check, read_map

    try:
        check(path, read_map(columns) if columns else None, played=played)
    except (ValueError, OSError) as error:
        fail(str(error), "nothing was started and nothing stored; mend the folder, then repeat the command", code=2)


def check_recipe(preset: str, overrides: str) -> None:
    """Ends the command, with code 2, unless the preset and its overrides exist: before an hour of training."""
    from models.presets import recipe

    try:
        recipe(preset, overrides)
    except (ValueError, TypeError, AttributeError) as error:
        said = str(error) if isinstance(error, ValueError) else f"overrides {overrides} do not fit the recipe: {error}"
        fail(said, "such as --preset tiny --overrides '{\"pretrain.epochs\": 2}'", code=2)


def check_policy(policy: str) -> None:
    """Ends the command, with code 2, unless the retraining policy is one that the trigger can keep."""
    from monitoring.trigger import parse

    try:
        parse(policy)
    except ValueError as error:
        hint = 'give nightly, on_drift, or JSON such as {"when": "on_drift", "cooldown_hours": 12}'
        fail(str(error), hint, code=2)


def check_canary(canary: str) -> None:
    """Ends the command, with code 2, unless ``canary`` says how a candidate is tried."""
    from monitoring.trial import config_of

    try:
        config_of(canary)
    except ValueError as error:
        fail(str(error), "such as --canary 0.2, or nothing for no canary", code=2)


def check_user(user: str) -> None:
    """Ends the command, with code 2, unless ``user`` is an id that a server would take."""
    if not 0 < len(user) <= MAX_USER or any(ord(character) < 32 or ord(character) == 127 for character in user):
        said = f"--user {user[:40]!r} is empty, longer than {MAX_USER} characters or holds control characters"
        fail(said, "give an id of your log; of the simulator's people: --user u00001", code=2)


def checked_time(given: str | None, option: str) -> str | None:
    """``given`` as an ISO 8601 time with a zone, UTC unless it names one; ends the command when it is none."""
    if given is None:
        return None
    try:
        time = datetime.fromisoformat(given)
    except ValueError:
        fail(f"{option} {given!r} is not a time", f"give it as ISO 8601, such as {option} 2026-01-15T00:00", code=2)
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).isoformat()


class CleanErrors(TyperGroup):
    """Turns what a command raises into ``fail``; ``--debug`` shows the traceback as well."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; Typer's own errors (exit, abort, usage) pass."""
        try:
            return super().invoke(ctx)
        except typer.Abort:
            raise
        except KeyboardInterrupt:  # what was started is torn down by now
            err.print("interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:  # whoever read our output, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except Exception as error:
            if hasattr(error, "exit_code"):
                raise
            if ctx.params.get("debug"):
                err.print(escape(traceback.format_exc()), soft_wrap=True)
            hint = getattr(error, "hint", "") or "`onerec --debug ...` shows where it happened"
            fail(_message(error), hint)


def _message(error: Exception) -> str:
    """The text of errors that were written for people; others are named, since their text alone says too little."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    ours = type(error).__module__.split(".")[0] in {"features", "monitoring", "models", "components", "pipelines"}
    return text if text and (ours or isinstance(error, ValueError | OSError)) else f"{type(error).__name__}: {text}"


app = typer.Typer(
    cls=CleanErrors,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _show_version(value: bool) -> None:
    if value:
        from importlib.metadata import PackageNotFoundError, version

        try:
            out.print(version("onerec-platform"))
        except PackageNotFoundError:
            out.print("not installed; running from the source tree")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """OneRec as a platform: a generative recommender, trained, served and retrained on the exposures it creates.

    Start with [bold]onerec up[/], then [bold]onerec loop[/]; [bold]onerec doctor[/] looks for what is missing.
    """
    # A polite kill tears down in the same order as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
