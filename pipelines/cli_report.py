"""`onerec report`: the daily report as one HTML file that opens without a network."""

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli import HOME, Home, Json, app, check_folder, check_output, emit, fail, out


@app.command()
def report(
    day: Annotated[str, typer.Option(help="A UTC day, such as 2026-01-15; default: the newest stored.")] = "",
    days: Annotated[int, typer.Option(help="How many days the plots reach back.", min=2, max=366)] = 14,
    output: Annotated[Path | None, typer.Option(help="The file; default: HOME/reports/DAY.html.")] = None,
    home: Home = HOME,
    json_: Json = False,
) -> None:
    """Writes what happened up to a day: users, stay time, arms, feedback, drift, decisions, canaries, intake."""
    from features.storage import connect
    from monitoring.daily import NothingStored, write_day
    from pipelines import stack

    try:
        given = date.fromisoformat(day) if day else None
    except ValueError:
        fail(f"--day {day!r} is not a day", "give it as ISO 8601, such as --day 2026-01-15", code=2)
    if given and not 1970 < given.year < 9999:  # plots reach back and a day ahead
        fail(f"--day {day} is in no log", "give a day of 1971 to 9998, such as --day 2026-01-15", code=2)
    if output:
        check_output(output)
    else:
        check_folder(home, "--home")
    stack.activate(home, ["s3"])
    storage = connect()
    try:
        chosen = given or _newest_day()
        path = write_day(storage, chosen, output or home / "reports" / f"{chosen}.html", days)
    except NothingStored as error:
        fail(str(error), "`onerec status` shows until when impressions are stored")
    if json_:
        emit({"day": chosen, "report": path.resolve()})
        return
    out.print(f"report: [bold]{path.resolve()}[/] (opens without a network)", soft_wrap=True)


def _newest_day() -> date:
    """Of the newest stored hour."""
    from pipelines.cli_models import newest_ms

    if not (end := newest_ms()):
        fail("no exposures are stored", "ingest a log first: `onerec ingest PATH`")
    return (datetime.fromtimestamp(end / 1000, UTC) - timedelta(hours=1)).date()
