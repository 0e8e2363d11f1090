"""Published exposure logs as ``Dataset`` tables: the layout is recognised from the files' names."""

from pathlib import Path

from features.datasets.dataset import Dataset
from features.datasets.kuairand import holds_kuairand, load_kuairand

__all__ = ["Dataset", "load"]


def load(path: Path) -> Dataset:
    """Reads the log below ``path``; raises ValueError naming the path and the layouts that are understood."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; give the folder of a downloaded log, such as KuaiRand-Pure")
    if holds_kuairand(path):
        return load_kuairand(path)
    found = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else ["a file, not a folder"]
    raise ValueError(
        f"{path} holds no log that is understood (found: {', '.join(found) or 'nothing'}); expected KuaiRand: "
        "log_standard*.csv, user_features*.csv and video_features_basic*.csv, in this folder or in its data/"
    )
