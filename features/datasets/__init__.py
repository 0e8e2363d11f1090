"""Published exposure logs as ``Dataset`` tables: the layout is recognised from the files' names."""

from pathlib import Path

from features.datasets.dataset import Dataset
from features.datasets.kuairand import check_kuairand, holds_kuairand, load_kuairand

__all__ = ["Dataset", "check", "load"]


def load(path: Path) -> Dataset:
    """Reads the log below ``path``; raises ValueError naming the path and the layouts that are understood."""
    _recognise(path)
    return load_kuairand(path)


def check(path: Path) -> None:
    """Looks at the log below ``path`` without reading it all; raises ValueError when it could not be learned from.

    Quick, so that a wrong path ends a command before it starts anything: the layout, the columns, and two users.
    """
    _recognise(path)
    check_kuairand(path)


def _recognise(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"{path} does not exist; give the folder of a downloaded log, such as KuaiRand-Pure")
    if holds_kuairand(path):
        return
    found = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else ["a file, not a folder"]
    raise ValueError(
        f"{path} holds no log that is understood (found: {', '.join(found) or 'nothing'}); expected KuaiRand: "
        "log_standard*.csv, user_features*.csv and video_features_basic*.csv, in this folder or in its data/"
    )
