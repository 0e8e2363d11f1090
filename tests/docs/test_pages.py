"""What the pages tell people to open, type or set exists: links, files, commands, their options, targets, variables.

The log of experiments and the decisions are dated: their links lead somewhere, their commands are those of their day.
"""

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from features.settings import Settings
from pipelines.__main__ import app

ROOT = Path(__file__).parents[2]
OURS = "features|monitoring|models|components|pipelines|benchmarks"
PAGES = [
    page
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "manifests/*.md", "helm/onerec/*.md")
    for page in sorted(ROOT.glob(pattern))
]
DATED = {ROOT / "docs" / "log.md", *(ROOT / "docs" / "decisions").glob("*.md")}
PRESENT = [page for page in PAGES if page not in DATED]
FENCED = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
NO_MODULE = re.compile(r"\.(?:md|json|html|org|com)$")
PROGRAMS = ("onerec", "make", "python")
ONEREC: Any = typer.main.get_command(app)
ELSEWHERE = ("models/onerec/", "manifests/exposures/", "manifests/consumed/", "pipelines/compiled/")
"""Keys of the bucket, and what `onerec compile` writes."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def spans(page: Path) -> list[str]:
    """Inline code."""
    return re.findall(r"`([^`\n]+)`", FENCED.sub("", page.read_text()))


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command of ours in inline code and in blocks, without comments and leading assignments."""
    for line in [*spans(page), *lines(page)]:
        told = re.split(r"\s{3,}", line)[0].replace("[", " ").replace("]", " ")
        for part in re.split(r"\s(?:&&|\|\||\||;|--|&)(?:\s|$)", told):
            words = shlex.split(part) if re.search(rf"\b(?:{'|'.join(PROGRAMS)}) ", part) and closed(part) else []
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words and words[0] in PROGRAMS:
                yield words


def lines(page: Path) -> Iterator[str]:
    """The lines of blocks; those that a backslash or an open quotation continues are one."""
    for block in FENCED.findall(page.read_text()):
        begun = ""
        for line in block.replace("\\\n", " ").splitlines():
            begun += line.partition(" #")[0]
            if closed(begun) or not begun.startswith(PROGRAMS):
                yield begun
                begun = ""
        assert not begun, f"{page}: the quotation is never closed: {begun}"


def closed(text: str) -> bool:
    try:
        shlex.split(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]+`", "", FENCED.sub("", page.read_text()))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@cache
def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ +(.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_files_and_names_in_the_code_exist(page: Path) -> None:
    for span in spans(page):
        if found := re.fullmatch(rf"(?:{OURS}|tests|docs|helm|manifests)/[\w./*-]+", span):
            assert span.startswith(ELSEWHERE) or any(ROOT.glob(found[0].rstrip("/"))), span
        elif (found := re.match(rf"(?:{OURS})(?:\.\w+)+", span)) and not NO_MODULE.search(found[0]):
            assert is_name(found[0]) or is_value(found[0]), span


def is_name(dotted: str) -> bool:
    """Whether it is a module, or something that the module before the last dots speaks of."""
    parts = dotted.split(".")
    for depth in range(len(parts), 0, -1):
        if found := source_of(".".join(parts[:depth])):
            return all(re.search(rf"\b{name}\b", found.read_text()) for name in parts[depth:])
    return False


def is_value(dotted: str) -> bool:
    """Whether the chart has a value of this name."""
    at = yaml.safe_load((ROOT / "helm" / "onerec" / "values.yaml").read_text())
    for part in dotted.split("."):
        at = at.get(part) if isinstance(at, dict) else None
    return at is not None


def source_of(module: str) -> Path | None:
    """Where the code is that `python -m` runs, or an import reads."""
    path = ROOT.joinpath(*module.split("."))
    candidates = (path.with_suffix(".py"), path / "__main__.py", path / "__init__.py")
    return next((each for each in candidates if each.exists()), None)


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_commands_of_onerec_exist_with_their_options(page: Path) -> None:
    for words in commands(page):
        if words[0] == "onerec":
            check_onerec(words[1:])


def check_onerec(words: list[str]) -> None:
    """Follows the words down the commands, as Typer would; capitals and dots stand for what a reader puts there."""
    at, depth = ONEREC, 0
    while hasattr(at, "commands"):
        rest = parsed(at, words)
        if not rest:
            assert depth == 0, f"{at.name}: which of its commands?"
            return
        if rest[0].isupper() or rest[0] == "...":
            return
        assert rest[0] in at.commands, rest
        at, words, depth = at.commands[rest[0]], rest[1:], depth + 1
    assert parsed(at, words) == [], f"{at.name} takes no such argument"


def parsed(command: Any, words: list[str]) -> list[str]:
    """What Typer's parser leaves of the words; raises when it knows an option not."""
    valued = {name for each in command.params if not getattr(each, "is_flag", True) for name in each.opts}
    completed = [*words, "VALUE"] if words and words[-1] in valued else words
    return list(command.make_parser(command.context_class(command)).parse_args(list(completed))[1])


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_modules_run_with_their_options(page: Path) -> None:
    for words in commands(page):
        if words[:2] == ["python", "-m"] and re.match(OURS, words[2]) and words[2] != "benchmarks.NAME":
            path = source_of(words[2])
            assert path is not None, words
            given = {word.partition("=")[0] for word in words[3:] if word.startswith("--")}
            assert given <= taken(path), words


@cache
def taken(path: Path) -> set[str]:
    """Options as argparse has them, in strings, or as Typer makes them of the arguments of `main`."""
    tree = list(ast.walk(ast.parse(path.read_text())))
    texts = {each.value for each in tree if isinstance(each, ast.Constant) and isinstance(each.value, str)}
    mains = [each for each in tree if isinstance(each, ast.FunctionDef) and each.name == "main"]
    names = {f"--{each.arg.strip('_').replace('_', '-')}" for main in mains for each in main.args.args}
    return names | {text for text in texts if text.startswith("--")}


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_targets_of_make_exist_with_their_variables(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for words in commands(page):
        if words[0] == "make":
            for word in words[1:]:
                name, given, _ = word.partition("=")
                wanted = rf"^{name} \?=|\$\({name}\)" if given else rf"^{name}:"
                assert re.search(wanted, makefile, re.MULTILINE), words


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_variables_are_read_by_something(page: Path) -> None:
    known = {f"ONEREC_{name.upper()}" for name in Settings.model_fields} | other_variables()
    assert set(re.findall(r"\bONEREC_\w*[A-Z]\b", page.read_text())) <= known


@cache
def other_variables() -> set[str]:
    """Those that a compilation or a test asks the environment for."""
    files = [ROOT / "components" / "base.py", *(ROOT / "tests").rglob("*.py")]
    asked = re.compile(r"environ(?:\.get\(|\[)\"(ONEREC_\w+)\"")
    return {name for file in files for name in asked.findall(file.read_text())}


def test_pages_that_the_code_refers_to_exist() -> None:
    sources = [path for folder in OURS.split("|") for path in (ROOT / folder).rglob("*.py")]
    named = {name for path in sources for name in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text())}
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_a_page_that_lies_is_caught(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    block = "onerec train --speed 3\nONEREC_X=1 onerec up && onerec down --only s3 # well\nmake tea"
    page.write_text(f"`onerec frobnicate` and `onerec loop --data`\n```\n{block}\n```\n")
    frobnicate, data, train, up, down, tea = commands(page)
    assert (up, down, tea) == (["onerec", "up"], ["onerec", "down", "--only", "s3"], ["make", "tea"])
    for well in (data, up, down):
        check_onerec(well[1:])
    for ill in (frobnicate[1:], ["items"], ["items", "list", "all"]):
        with pytest.raises(AssertionError):
            check_onerec(ill)
    with pytest.raises(Exception, match="No such option"):
        check_onerec(train[1:])
