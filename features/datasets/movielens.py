"""MovieLens (Harper and Konstan, TiiS 2015), official layout: ``ratings.csv`` and ``movies.csv``.

A rating is an interaction with a click. From 4 stars on it is also a like and a long view, down to 2 stars a dislike.
Genres become tags, the title keeps its year. All CSV releases (small, 20M, 25M, 32M) have this layout. Left out:
``tags.csv``, the genome and the older .dat files.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from features.datasets.dataset import TOO_FEW, Chunk, Seen
from features.datasets.interactions import OLDEST_MS, interactions_table, latest_ms
from features.datasets.text import TextFiles, as_text, header, read_text, reject, text_chunks
from features.schema import ITEM, USER, conform

EXPECTED = "MovieLens: ratings.csv and movies.csv"
LIKED, DISLIKED = 4.0, 2.0
"""Stars from which a rating is a like, and down to which it is a dislike."""

_RATING_COLUMNS = ("userId", "movieId", "rating", "timestamp")
_MOVIE_COLUMNS = ("movieId", "title", "genres")
_NO_GENRES = "(no genres listed)"


def holds_movielens(path: Path) -> bool:
    """Whether ``path`` is a folder of MovieLens CSV files."""
    return (path / "ratings.csv").is_file() and (path / "movies.csv").is_file()


@dataclass(frozen=True)
class MovieLens:
    """The ratings in the folder ``path``."""

    path: Path

    @property
    def name(self) -> str:
        """The release."""
        return self.path.resolve().name

    @property
    def files(self) -> list[Path]:
        """Ratings and movies."""
        return [self.path / "ratings.csv", self.path / "movies.csv"]

    @property
    def unread(self) -> dict[str, str]:
        """Files that are there and not read."""
        others = {"tags.csv": "free-text tags", "genome-scores.csv": "computed from the ratings of the whole period"}
        return {name: why for name, why in others.items() if (self.path / name).exists()}

    @property
    def text(self) -> TextFiles:
        """The log file."""
        return TextFiles(files=self.files[:1], required=_RATING_COLUMNS, user="userId")

    @property
    def parts(self) -> int:
        """See ``dataset.Log``."""
        return self.text.partitions

    @property
    def labels(self) -> dict[str, str]:
        """See ``dataset.Published``."""
        return {}

    @property
    def played(self) -> bool:
        """See ``dataset.Published``."""
        return False

    def check(self) -> None:
        """Reads the headers, and the ratings until it has met two users; raises ValueError naming what is wrong."""
        header(self.path / "movies.csv", _MOVIE_COLUMNS)
        users = self.text.first_users(2)
        if not users:
            raise ValueError(f"{self.path / 'ratings.csv'} has no rows; expected ratings")
        if len(users) == 1:
            raise ValueError(f"the log in {self.path} has 1 user ({users.pop()!r}); {TOO_FEW}")

    def chunks(self, scratch: Path, skip: Collection[str] = ()) -> Iterator[Chunk]:
        """See ``dataset.Log``."""
        return text_chunks(self.text.frames(scratch, skip), _parse, _exposures)

    def items(self, seen: Seen) -> Iterator[tuple[pa.Table, pa.Table]]:
        """See ``dataset.Log``."""
        movies = read_text(self.path / "movies.csv", _MOVIE_COLUMNS)
        rejected = movies[movies["movieId"] == ""]
        movies = movies[movies["movieId"] != ""].drop_duplicates("movieId")
        unknown = pd.Index(seen.items.column("item_id").to_pylist()).difference(pd.Index(movies["movieId"]))
        movies = pd.concat([movies, pd.DataFrame({"movieId": unknown})], ignore_index=True).fillna("")
        genres = [names.split("|") if names and names != _NO_GENRES else None for names in movies["genres"]]
        columns = {
            "item_id": pa.array(movies["movieId"], pa.string()),
            "title": pa.array(movies["title"].replace("", None), pa.string()),
            "tags": pa.array(genres, pa.list_(pa.string())),
            "duration_ms": pa.array(np.zeros(len(movies), np.int64)),
        }
        yield conform(pa.table(columns), ITEM), as_text(rejected.assign(reason="movieId is empty"))

    def users(self, seen: Seen) -> pa.Table:
        """See ``dataset.Log``: MovieLens says nothing about its users."""
        return conform(seen.users, USER)


def _parse(ratings: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """With columns of numbers, ``stars`` and ``seconds``, and, per row, why it is rejected ("" = valid)."""
    stars, seconds = (pd.to_numeric(ratings[name], errors="coerce") for name in ("rating", "timestamp"))
    reasons = pd.Series("", index=ratings.index, dtype=object)
    reject(reasons, ratings["malformed"] != "", "the number of columns is not the header's")
    reject(reasons, (ratings["userId"] == "") | (ratings["movieId"] == ""), "userId or movieId is empty")
    reject(reasons, ~stars.between(0, 5), "rating is not a number from 0 to 5")
    reject(reasons, ~(seconds > 0), "timestamp is not a positive number")
    reject(reasons, seconds * 1000 < OLDEST_MS, "timestamp is before 1990: a clock that was never set")
    reject(reasons, seconds * 1000 > latest_ms(), "timestamp lies in the future")
    return ratings.assign(stars=stars, seconds=seconds), reasons


def _exposures(ratings: pd.DataFrame) -> pa.Table:
    ratings = ratings.sort_values(["userId", "seconds"], kind="stable")
    stars = ratings["stars"].to_numpy(np.float64)
    flags = {"like": stars >= LIKED, "long_view": stars >= LIKED, "dislike": stars <= DISLIKED}
    user, movie = ratings["userId"].to_numpy(object), ratings["movieId"].to_numpy(object)
    return interactions_table(user, movie, ratings["seconds"].to_numpy(np.int64) * 1000, flags)
