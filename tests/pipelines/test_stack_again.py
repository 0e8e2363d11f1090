"""`onerec up` looks again before it says that all is well, and refuses ports that nobody would listen on."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from small_services import LISTEN, left, listens, named, small
from typer.testing import CliRunner

from pipelines import stack
from pipelines.__main__ import app
from pipelines.services import HOST, SERVICES, Service, Site, ray_folder
from pipelines.stack import StackError


def killing(victim: str, home: Path, *, then: bool = True) -> Service:
    """A service that kills another one as soon as it listens, and ``then`` is healthy, or never."""

    def healthy(site: Site) -> bool:
        process = stack.entries(home)[victim].recorded.process()
        if listens(site, "last") and process:
            process.kill()
            process.wait(10)
        return then and not process

    return replace(small("last", needs=(victim,)), healthy=healthy, patience=600)


DYING = LISTEN.replace("listening", "about to die")


@pytest.mark.parametrize("then", [True, False], ids=["with the last one", "while another is waited for"])
@pytest.mark.parametrize("earlier", [False, True], ids=["of this call", "of an earlier call"])
def test_what_died_after_it_was_healthy_is_told_with_its_log(home: Path, earlier: bool, then: bool) -> None:
    services = named(small("first", DYING), small("good"), killing("first", home, then=then))
    if earlier:
        stack.up(home, ["first"], services=services)
    with pytest.raises(StackError, match=r"first was healthy, then ended; .*first.log:\n  \| about to die"):
        stack.up(home, services=services)
    assert left(home) == []
    assert list(stack.entries(home)) == (["first"] if earlier else [])


def test_what_ended_while_somebody_else_answers_on_its_port(home: Path) -> None:
    """Health is asked over the network, and whoever listens there may say yes."""
    ending = replace(small("first", "print('no room', flush=True)"), healthy=lambda site: True)
    with pytest.raises(StackError, match=r"first was healthy, then ended(.|\n)*no room"):
        stack.up(home, services=named(ending, replace(small("never", patience=600), healthy=lambda site: False)))


def test_ray_is_healthy_when_its_start_has_ended(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts answer while `ray start` may still give up; what an earlier start left says nothing."""
    ray, site = SERVICES["ray"], Site(home=home, ports={"ray": dict.fromkeys(SERVICES["ray"].ports, 1)}, credentials={})
    monkeypatch.setattr("pipelines.services._answers_grpc", lambda port: True)
    folder = ray_folder(home)
    folder.mkdir()
    try:
        (folder / "ray_current_cluster").write_text("127.0.0.1:1")
        assert ray.healthy(site)
        ray.prepare(site)
        assert not ray.healthy(site)
    finally:
        folder.rmdir()


def test_what_died_fails_the_command(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    services = named(small("first", DYING), killing("first", home))
    monkeypatch.setattr(stack, "up", partial(stack.up, services=services))
    result = CliRunner().invoke(app, ["up", "--home", str(home)], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "error: first was healthy, then ended" in result.stderr
    assert "hint: " in result.stderr


def test_who_answers_badly_at_the_end_gets_a_second_look(home: Path) -> None:
    """A busy service may miss one look; one that stays away is told once its patience is over."""
    looks = iter([True, False, True])
    busy = replace(small("busy"), healthy=lambda site: next(looks))
    assert stack.up(home, services=named(busy)) == ["busy"]
    stack.down(home, services=named(busy))
    looks = iter([True, *[False] * 1000])
    with pytest.raises(StackError, match="busy does not answer on"):
        stack.up(home, services=named(replace(busy, patience=0.2)))
    assert left(home) == []


def test_a_port_for_a_service_that_is_not_started_is_refused(home: Path) -> None:
    services = named(small("a"), small("b"))
    with pytest.raises(StackError, match="given for b, but it is not among those to start"):
        stack.up(home, ["a"], ports={"b": 20000}, services=services)
    stack.up(home, ["a"], services=services)
    port = stack.entries(home)["a"].ports["port"]
    assert stack.up(home, ["a"], ports={"a": port}, services=services) == []
    with pytest.raises(StackError, match=f"given for a, but it runs at {HOST}:{port} already") as caught:
        stack.up(home, ["a"], ports={"a": port - 1}, services=services)
    assert "onerec down --only a" in caught.value.hint
    stack.down(home, services=services)


ONCE = """
import pathlib, sys
mark = pathlib.Path("once")
if not mark.exists():
    mark.touch()
    sys.exit("too slow")
"""


@pytest.mark.parametrize(("tries", "enough"), [(1, False), (2, True)])
def test_what_gives_up_while_starting_is_started_again(home: Path, tries: int, enough: bool) -> None:
    services = named(replace(small("timid", ONCE + LISTEN), tries=tries))
    told: list[tuple[str, str]] = []
    if not enough:
        with pytest.raises(StackError, match=r"timid ended while starting(.|\n)*too slow"):
            stack.up(home, services=services)
        assert not left(home)
        return
    assert stack.up(home, services=services, progress=lambda *said: told.append(said)) == ["timid"]
    assert ("timid", "ended while starting; once more") in told
    assert stack.status(home, services=services)[0].state == "healthy"
    stack.down(home, services=services)
    assert not left(home)
