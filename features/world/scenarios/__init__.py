"""Scenarios: what happens to the simulated world, as files that can be read, compared and hashed.

Each ``<name>.toml`` has a ``description`` and a ``[world]`` table of ``SimulatorConfig`` fields; "never" stands for no
day at all. What it leaves out keeps its default, so a scenario says only what is special about it.
"""

import tomllib
from importlib.resources import files
from typing import Any


def names() -> list[str]:
    """The scenarios there are."""
    return sorted(file.name.removesuffix(".toml") for file in files(__name__).iterdir() if file.name.endswith(".toml"))


def load(name: str) -> tuple[str, dict[str, Any]]:
    """Description and fields of the scenario called ``name``; raises ValueError naming those there are."""
    if name not in names():
        raise ValueError(f"there is no scenario {name!r}; the scenarios are {', '.join(names())}")
    document = tomllib.loads((files(__name__) / f"{name}.toml").read_text(encoding="utf-8"))
    fields = {key: None if value == "never" else value for key, value in document["world"].items()}
    return str(document["description"]), {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
