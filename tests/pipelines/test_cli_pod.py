"""`onerec` in a pod: no stack of its own, services from the environment. A log read in serves users at once."""

import json
from pathlib import Path

from typer.testing import CliRunner

from features.intake import exposures
from features.online import OnlineFeatures
from features.settings import Settings
from features.storage import Storage
from pipelines.__main__ import app

RATINGS = "userId,movieId,rating,timestamp\n" + "".join(
    f"{user},{movie},{3 + (user + movie) % 3},{1_600_000_000 + 100 * user + movie}\n"
    for user in range(1, 6)
    for movie in range(1, 21)
)
MOVIES = "movieId,title,genres\n" + "".join(f"{movie},Film {movie} (2000),Drama|Comedy\n" for movie in range(1, 21))


def run(*arguments: str, home: Path) -> str:
    result = CliRunner().invoke(app, [*arguments, "--json", "--home", str(home)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_versions_and_pruning_need_no_local_stack(environment: Settings) -> None:
    assert json.loads(run("bundles", "list", home=environment.home)) == []
    assert json.loads(run("prune", home=environment.home))["merged"] == 0


def test_a_log_is_read_in(environment: Settings, s3: Storage, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.mkdir()
    (log / "ratings.csv").write_text(RATINGS)
    (log / "movies.csv").write_text(MOVIES)
    run("ingest", str(log), home=environment.home)
    stored = exposures.read(s3)
    assert stored.num_rows == 100
    newest = int(stored["event_time"].cast("int64").to_numpy().max())
    (user,) = OnlineFeatures.connect(config=environment).read([stored["user_id"][0].as_py()], newest + 1)
    assert user.short is not None
    assert len(user.short) > 0
