"""The frame of the `onerec` command: the application, shared options, output and errors.

Commands live in ``pipelines/cli_*.py``; each imports ``app`` from here, decorates its functions and is imported by
``pipelines.__main__``. Heavy libraries are imported inside the commands, so that `onerec --help` stays quick.
Results go to stdout (``--json``: one JSON document), progress and errors to stderr. Exit code 0, 1 (failed) or 2
(bad usage).
"""

import json
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from itertools import pairwise
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
    nearest = _nearest(Path(given))
    if not nearest.is_dir():
        raise typer.BadParameter(f"{nearest} is a file; give a folder, such as .onerec")
    return Path(given)


def _nearest(path: Path) -> Path:
    """``path``, or of the folders above it the first that there is."""
    return next(each for each in (path, *path.parents, Path("/")) if os.path.lexists(each))


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
Select = Annotated[
    str, typer.Option(help="What of the beam is shown: the likeliest (model), or the best by reward or by stay.")
]

HOME = Path(".onerec")
MAX_USER = 128
"""Characters of a user id, as the model server takes them."""
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")
BASE = re.compile(r"([a-z][a-z0-9-]*|\d{8}T\d{6}-[0-9a-f]+)?")
TIMES = ("start", "reference_start", "current_start", "end")
"""Parameters of pipelines that are times, in the order in which they must come."""


def fail(message: str, hint: str = "", code: int = 1) -> NoReturn:
    """Ends the command with a clean error: what is wrong, and what to do about it."""
    err.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    if hint:
        err.print(f"[bold]hint:[/] {escape(hint)}", soft_wrap=True)
    raise typer.Exit(code)


def emit(value: Any) -> None:
    """Prints ``value`` as one JSON document on stdout; paths, times and the like become strings."""
    print(json.dumps(value, indent=1, default=str))


def check_folder(folder: Path, option: str) -> None:
    """Ends the command, with code 2, unless files can be written to ``folder``, which is made where there is none."""
    _check_place(folder, f"{option} {folder}")


def check_output(path: Path) -> None:
    """Ends the command, with code 2, unless a file can be written to ``path``, given as --output."""
    if path.is_dir():
        fail(f"--output {path} is a folder", f"give a file, such as --output {path / 'page.html'}", code=2)
    if not path.exists():
        _check_place(path.parent, f"--output {path}")
    elif not os.access(path, os.W_OK):
        fail(f"--output {path} cannot be written", "give another file, or the right to write this one", code=2)


def _check_place(folder: Path, given: str) -> None:
    """Tried out: what the modes of a folder allow says nothing of a read-only disk, or of /proc."""
    nearest, hint = _nearest(folder), "give a path that this user can write to; nothing was started"
    if not nearest.is_dir():
        fail(f"{given}: {nearest} is a file, not a folder", hint, code=2)
    try:
        with suppress(FileNotFoundError):
            folder.lstat()  # refuses a name that is too long
        tempfile.TemporaryDirectory(prefix=".onerec-", dir=nearest).cleanup()
    except OSError as error:
        fail(f"{given}: nothing can be made in {nearest} ({error.strerror})", hint, code=2)


def check_log(path: Path, columns: str = "", *, played: bool = False) -> None:
    """Ends the command, with code 2, unless ``path`` holds a log that can be learned from: before anything starts.

    ``columns`` is the map of a log in no known layout; with ``played`` the log must have play times.
    """
    from features.datasets import check, read_map

    try:
        check(path, read_map(columns) if columns else None, played=played)
    except (ValueError, OSError) as error:
        fail(
            _message(error), "nothing was started and nothing stored; mend the folder, then repeat the command", code=2
        )


def check_recipe(preset: str, overrides: str, where: str = "") -> None:
    """Ends the command, with code 2, unless the preset and its overrides exist: before an hour of training.

    ``where`` stands before the message. In an image without torch, which has no models, overrides must be a JSON
    object and the rest is left to the first step that trains.
    """
    from models.overrides import read_overrides

    try:
        read_overrides(overrides)
        from models.presets import recipe

        recipe(preset, overrides)
    except (ValueError, TypeError, AttributeError) as error:
        said = str(error) if isinstance(error, ValueError) else f"overrides {overrides} do not fit the recipe: {error}"
        fail(where + said, "such as preset tiny with overrides '{\"pretrain.epochs\": 2}'", code=2)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        err.print(f"[yellow]warning:[/] {escape(where)}not looked up: the presets need torch, which is not here")


def check_policy(policy: str, where: str = "") -> None:
    """Ends the command, with code 2, unless the retraining policy is one that the trigger can keep."""
    from monitoring.trigger import parse

    try:
        parse(policy)
    except ValueError as error:
        hint = 'give nightly, on_drift, or JSON such as {"when": "on_drift", "cooldown_hours": 12}'
        fail(f"{where}{error}", hint, code=2)


def check_canary(canary: str, where: str = "") -> None:
    """Ends the command, with code 2, unless ``canary`` says how a candidate is tried."""
    from monitoring.trial import config_of

    try:
        config_of(canary)
    except ValueError as error:
        fail(f"{where}{error}", "such as 0.2, or nothing for no canary", code=2)


def check_run_id(run_id: str, option: str = "--run-id") -> None:
    """Ends the command, with code 2, unless ``run_id``, which names a folder and a log, can be the id of a run."""
    if not RUN_ID.fullmatch(run_id):
        said = f"{option} {run_id!r} is no id of a run; expected letters, digits, dots, dashes and underscores"
        fail(said, "leave it out for a new run; `onerec runs` shows the ids there are", code=2)


def check_select(select: str) -> None:
    """Ends the command, with code 2, unless the model server knows this way to select."""
    from models.serving import selection

    try:
        selection.check_select(select, "beam")
    except ValueError as error:
        fail(str(error), "such as --select stay", code=2)


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
        fail(f"{option} {given!r} is not a time", "give it as ISO 8601, such as 2026-01-15T00:00", code=2)
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).isoformat()


def checked_parameters(given: Mapping[str, str], where: str) -> dict[str, str]:
    """A pipeline's parameters with a zone in every time; ends the command, code 2, at what no pipeline could use.

    ``where`` says whose they are and stands before the message, with the parameter's name.
    """

    def named(name: str) -> str:
        return f"{where}parameter {name}: "

    if "policy" in given:
        check_policy(given["policy"], named("policy"))
    if "canary" in given:
        check_canary(given["canary"], named("canary"))
    if "preset" in given:
        check_recipe(given["preset"], "{}", named("preset"))
    if "overrides" in given:
        check_recipe(given.get("preset", "tiny"), given["overrides"], named("overrides"))
    if not BASE.fullmatch(given.get("base", "")):
        said = f"{named('base')}{given['base']!r} is neither an alias nor a version of `onerec bundles list`"
        fail(said, "such as production, or leave it out", code=2)
    if given.get("run_id"):
        check_run_id(given["run_id"], f"{where}parameter run_id:")
    times = {name: checked_time(given[name], f"{where}parameter {name}:") for name in TIMES if given.get(name)}
    check_order({f"{where}parameter {name}": time for name, time in times.items()})
    return {**given, **{name: time for name, time in times.items() if time}}


def check_order(times: Mapping[str, str | None]) -> None:
    """Ends the command, with code 2, unless each of the times with a zone, by what they were given as, comes later."""
    known = [(name, datetime.fromisoformat(time)) for name, time in times.items() if time]
    for (before, first), (after, second) in pairwise(known):
        if first >= second:
            said = f"{after} {second.isoformat()} is not after {before} {first.isoformat()}"
            fail(said, "a window begins before it ends; exchange the two, or leave one out", code=2)


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
            fail(_message(error), getattr(error, "hint", "") or _hint(error))


def _message(error: Exception) -> str:
    """The text of errors that were written for people; others are named, since their text alone says too little."""
    if isinstance(error, OSError) and error.strerror:
        what = f"{path} cannot be used" if (path := _path_of(error)) else type(error).__name__
        return f"{what}: {error.strerror}"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    ours = type(error).__module__.split(".")[0] in {"features", "monitoring", "models", "components", "pipelines"}
    return text if text and (ours or isinstance(error, ValueError | OSError)) else f"{type(error).__name__}: {text}"


def _hint(error: Exception) -> str:
    """What to do about an error that does not say so itself."""
    refused = "give another path, or this user the right to that one; " if _path_of(error) else ""
    return f"{refused}`onerec --debug ...` shows where it happened"


def _path_of(error: Exception) -> str:
    """The file or folder that the system refused; empty for other errors."""
    return error.filename if isinstance(error, OSError) and isinstance(error.filename, str) else ""


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
