"""What can be said of the Dockerfile without building it; the quick suite holds it."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from cluster_rules.policies import pinned

PROJECT = Path(__file__).resolve().parents[2]
TARGETS = ("pipelines", "serve", "train")
PACKAGES = ("features", "monitoring", "models", "components", "pipelines")


def stages() -> dict[str, list[str]]:
    """The instructions of each stage, continuation lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", (PROJECT / "Dockerfile").read_text(), flags=re.MULTILINE)
    found: dict[str, list[str]] = {"": []}
    for line in filter(None, map(str.strip, text.replace("\\\n", " ").splitlines())):
        if line.startswith("FROM "):
            found[line.split()[-1]] = []
        found[list(found)[-1]].append(line)
    return found


def test_the_base_is_pinned_and_nothing_else_is_pulled() -> None:
    built = stages()
    (base,) = built[""]
    assert pinned(base.removeprefix("ARG BASE="))
    sources = {line.split()[1] for lines in built.values() for line in lines if line.startswith("FROM ")}
    assert sources - set(built) == {"${BASE}"}
    copied = {
        word.removeprefix("--from=")
        for lines in built.values()
        for line in lines
        for word in line.split()
        if "--from=" in word
    }
    assert copied <= set(built)
    assert not any(line.startswith("ADD ") for lines in built.values() for line in lines)


@pytest.mark.parametrize("target", TARGETS)
def test_images_run_as_nobody_and_install_nothing(target: str) -> None:
    lines = stages()[target]
    assert "USER 10001:10001" in lines
    assert not [line for line in lines if line.startswith("RUN ")]
    assert [line for line in lines if line.startswith("LABEL org.opencontainers.image.title=")]
    assert lines[0] == f"FROM runtime AS {target}"


@pytest.mark.parametrize("target", TARGETS)
def test_packages_are_extras_of_the_project_and_pinned(target: str) -> None:
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (line,) = [line for line in stages()[f"{target}-packages"] if line.startswith("RUN ")]
    named = re.findall(r"-r /requirements/(\w+)\.txt", line)
    assert target in named
    assert set(named) <= set(extras)
    (settings,) = [line for line in stages()["builder"] if line.startswith("ENV ")]
    install = dict(word.split("=", 1) for word in shlex.split(settings)[1:])["INSTALL"]
    assert "--only-binary :all:" in install
    assert install.endswith("--constraint constraints.txt")
    assert "pip install" not in line


def test_the_build_context_is_an_allow_list() -> None:
    rules = [line for line in (PROJECT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    named = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    assert all((PROJECT / name).exists() for name in named)
    assert {rule for rule in rules[1:] if not rule.startswith("!")} == {"**/__pycache__", "**/*.pyc"}
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    packages = {each.removesuffix("*") for each in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert set(named) == packages | {"pyproject.toml", "constraints.txt"}


def test_every_file_beside_the_code_is_in_the_wheel() -> None:
    """What the wheel leaves out is missing in the images only. The cluster's rules and dashboards are the chart's."""
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    taken = {
        path
        for package, rules in settings.items()
        for rule in rules
        for path in PROJECT.joinpath(*package.split(".")).glob(rule)
    }
    beside = {path for package in PACKAGES for path in (PROJECT / package).rglob("*.*") if path.is_file()}
    beside = {path for path in beside if path.suffix not in (".py", ".pyc")}
    of_the_chart = {
        path for path in beside if path.parent.name in ("compiled", "dashboards") or path.name == "alerts.yaml"
    }
    assert beside - of_the_chart == taken
