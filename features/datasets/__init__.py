"""Published exposure logs: the layout is recognised from the files' names, or given as a map of columns."""

import tempfile
from pathlib import Path

from features.datasets import amazon, kuairand, movielens
from features.datasets.columns import ColumnMap, Columns, read_map
from features.datasets.dataset import Dataset, Published, collect

__all__ = ["ColumnMap", "Dataset", "Published", "check", "load", "open_log", "read_map"]

_LAYOUTS = (
    (kuairand.EXPECTED, kuairand.holds_kuairand, kuairand.KuaiRand),
    (amazon.EXPECTED, amazon.holds_amazon, amazon.Amazon),
    (movielens.EXPECTED, movielens.holds_movielens, movielens.MovieLens),
)


def open_log(path: Path, columns: ColumnMap | None = None) -> Published:
    """The log at ``path``, nothing read yet; raises ValueError naming the path and the layouts that are understood."""
    if columns is not None:
        return Columns(path, columns)
    if not path.exists():
        raise ValueError(f"{path} does not exist; give the folder of a downloaded log, such as KuaiRand-Pure")
    for _, holds, layout in _LAYOUTS:
        if holds(path):
            return layout(path)
    found = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else ["a file, not a folder"]
    raise ValueError(
        f"{path} holds no log that is understood (found: {', '.join(found) or 'nothing'}); expected "
        + "; or ".join(expected for expected, _, _ in _LAYOUTS)
        + "; or any CSV or Parquet files with a map of their columns"
    )


def load(path: Path, columns: ColumnMap | None = None) -> Dataset:
    """Reads the whole log at ``path`` into memory; raises ValueError when it cannot be read or has no valid row."""
    with tempfile.TemporaryDirectory(prefix="onerec-log-") as scratch:
        return collect(open_log(path, columns), Path(scratch))


def check(path: Path, columns: ColumnMap | None = None, *, played: bool = False) -> None:
    """Looks at the log at ``path`` without reading it all; raises ValueError when it could not be learned from.

    Quick, so that a wrong path ends a command before it starts anything: the layout, the columns, and two users. With
    ``played`` a log without play times is refused.
    """
    log = open_log(path, columns)
    if played and not log.played:
        raise ValueError(f"the log in {path} has no play times; people who watch can be fitted on KuaiRand only")
    log.check()
