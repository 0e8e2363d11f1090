"""Writes the dashboards' JSON beside this file: ``python -m monitoring.dashboards``."""

from pathlib import Path

from monitoring.dashboards.boards import BOARDS
from monitoring.dashboards.panels import text

if __name__ == "__main__":
    for name, build in BOARDS.items():
        path = Path(__file__).with_name(f"{name}.json")
        path.write_text(text(build()))
        print(f"wrote {path}")
