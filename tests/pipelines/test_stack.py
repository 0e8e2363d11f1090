"""The local platform starts, reports, survives misfortune and ends without a trace: small services and real ones."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from small_services import LISTEN, left, named, small

from features.settings import settings
from features.storage import connect
from pipelines import processes, stack
from pipelines.services import HOST, MODELS, SERVICES, Service, Site
from pipelines.stack import StackError

# Ignores a polite end and has a grandchild in a session of its own, as Ray's processes may.
STUBBORN = (
    """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
"""
    + LISTEN
)


def test_up_is_harmless_twice_and_down_leaves_nothing(home: Path) -> None:
    services = named(small("a"), small("b", needs=("a",)))
    assert stack.up(home, services=services) == ["a", "b"]
    before = stack.entries(home)
    assert stack.up(home, services=services) == []
    assert stack.entries(home) == before
    assert [row.state for row in stack.status(home, services=services)] == ["healthy", "healthy"]
    assert stack.down(home, services=services) == ["a", "b"]
    assert stack.entries(home) == {}
    assert stack.status(home, services=services) == []
    assert left(home) == []
    assert all(processes.is_free(port) for entry in before.values() for port in entry.ports.values())
    assert stack.down(home, services=services) == []


def test_a_service_starts_only_when_what_it_needs_is_healthy(home: Path) -> None:
    seen: list[tuple[str, str]] = []
    services = named(small("late", needs=("early",)), small("early"))
    stack.up(home, ["late"], services=services, progress=lambda name, what: seen.append((name, what.split()[0])))
    stack.down(home, services=services)
    assert seen == [("early", "starting"), ("early", "healthy"), ("late", "starting"), ("late", "healthy")]


def test_crash_is_seen_and_mended_on_the_same_port(home: Path) -> None:
    services = named(small("a"), small("b"))
    stack.up(home, services=services)
    before = stack.entries(home)
    psutil.Process(before["a"].pid).kill()
    psutil.wait_procs([psutil.Process(before["a"].pid)], timeout=5)
    assert [row.state for row in stack.status(home, services=services)] == ["dead", "healthy"]
    with pytest.raises(StackError, match=r"a of .* does not run"):
        stack.activate(home)
    assert stack.up(home, services=services) == ["a"]
    after = stack.entries(home)
    assert after["b"] == before["b"]
    assert after["a"].ports == before["a"].ports
    assert after["a"].pid != before["a"].pid
    stack.down(home, services=services)


def test_hung_service_is_unhealthy(home: Path) -> None:
    services = named(small("a"))
    stack.up(home, services=services)
    # The kernel still accepts for it, so that here healthy means that it closes what it accepted.
    psutil.Process(stack.entries(home)["a"].pid).suspend()

    def answers(site: Site) -> bool:
        with socket.create_connection((HOST, site.ports["a"]["port"]), timeout=0.3) as connection:
            try:
                return connection.recv(1) == b""
            except TimeoutError:
                return False

    hung = named(Service(name="a", ports=("port",), command=lambda site: [], healthy=answers))
    assert [row.state for row in stack.status(home, services=hung)] == ["unhealthy"]
    stack.down(home, services=services)
    assert left(home) == []


@pytest.mark.parametrize(
    "script",
    ["print('no luck today'); raise SystemExit(3)", "print('no luck today', flush=True); import time; time.sleep(600)"],
)
def test_failed_start_tells_the_log_and_stops_the_others(home: Path, script: str) -> None:
    services = named(small("good"), small("bad", script, needs=("good",), patience=1.5))
    with pytest.raises(StackError, match=r"bad (ended while starting|does not answer)(.|\n)*no luck today"):
        stack.up(home, services=services)
    assert left(home) == []
    assert stack.entries(home) == {}


def test_failed_restart_leaves_what_ran_before(home: Path) -> None:
    good = small("good")
    stack.up(home, services=named(good))
    services = named(good, small("bad", "raise SystemExit(3)"))
    with pytest.raises(StackError):
        stack.up(home, services=services)
    assert [row.state for row in stack.status(home, services=services)] == ["healthy"]
    stack.down(home, services=services)


def test_missing_program_is_named(home: Path) -> None:
    missing = Service(name="a", ports=("port",), command=lambda site: ["no-such-program"], healthy=lambda site: True)
    with pytest.raises(StackError, match="'no-such-program' is not installed") as caught:
        stack.up(home, services=named(missing))
    assert "make install" in caught.value.hint


def test_port_in_use_is_named_with_its_owner(home: Path) -> None:
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(StackError, match=f"{port}: the port is in use by .*pid {os.getpid()}"):
            stack.up(home, ports={"a": port}, services=named(small("a")))
    assert left(home) == []
    stack.up(home, ports={"a": port}, services=named(small("a")))
    assert stack.entries(home)["a"].address == f"{HOST}:{port}"
    stack.down(home, services=named(small("a")))


def test_down_ends_stubborn_services_and_grandchildren(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "GRACE", 0.5)
    services = named(small("a", STUBBORN))
    stack.up(home, services=services)
    assert len(left(home)) == 2
    stack.down(home, services=services)
    assert left(home) == []


def test_down_ends_orphans_after_the_leader_or_the_record_is_gone(home: Path) -> None:
    services = named(small("a", STUBBORN))
    stack.up(home, services=services)
    leader = psutil.Process(stack.entries(home)["a"].pid)
    leader.kill()
    psutil.wait_procs([leader], timeout=10)
    (home / "stack.json").unlink()
    assert len(stack.strays(home, services=services)) == 1
    stack.down(home, services=services)
    assert left(home) == []


def test_a_recycled_pid_is_not_ours(home: Path) -> None:
    services = named(small("a"))
    stack.up(home, services=services)
    stack.down(home, services=services)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True) as innocent:
        entry = {"pid": innocent.pid, "create_time": time.time() - 3600, "ports": {"port": 1}, "address": "x:1"}
        content = {"services": {"a": {**entry, "log": str(home / "log"), "command": []}}}
        (home / "stack.json").write_text(json.dumps(content))
        assert [row.state for row in stack.status(home, services=services)] == ["dead"]
        assert stack.down(home, services=services) == []
        assert innocent.poll() is None
        innocent.kill()


def test_interrupt_during_up_stops_what_was_started(home: Path) -> None:
    services = named(small("a"), small("b", "import time; time.sleep(600)", needs=("a",)))

    def interrupt(name: str, what: str) -> None:
        if (name, what) == ("b", "starting"):
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt):
        stack.up(home, services=services, progress=interrupt)
    assert left(home) == []
    assert stack.entries(home) == {}


def test_impatient_interrupts_do_not_cut_the_tear_down_short(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "GRACE", 1.0)
    services = named(small("a", STUBBORN), small("b", "import time; time.sleep(600)", needs=("a",)))

    def interrupt(name: str, what: str) -> None:
        if (name, what) == ("b", "starting"):
            for delay in (0.3, 0.6, 0.9):
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt):
        stack.up(home, services=services, progress=interrupt)
    assert left(home) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_one_up_at_a_time(home: Path) -> None:
    def again(name: str, what: str) -> None:
        with pytest.raises(StackError, match="another `onerec up`"):
            stack.down(home)

    stack.up(home, services=named(small("a")), progress=again)
    stack.down(home, services=named(small("a")))


def test_unknown_service_and_damaged_state(home: Path) -> None:
    with pytest.raises(StackError, match="unknown service nonsense"):
        stack.up(home, ["nonsense"])
    home.mkdir(exist_ok=True)
    (home / "stack.json").write_text("{")
    with pytest.raises(StackError, match="damaged"):
        stack.status(home)


def test_activate_needs_a_stack(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEREC_S3_ENDPOINT", raising=False)
    with pytest.raises(StackError, match="not up") as caught:
        stack.activate(home)
    assert "onerec up" in caught.value.hint


def test_a_pod_keeps_the_services_of_its_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEREC_S3_ENDPOINT", "s3.example.com:443")
    before = dict(os.environ)
    stack.activate(home, ["s3"])
    assert dict(os.environ) == before


@pytest.fixture
def clean_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    settings.cache_clear()


def test_running_stops_only_what_it_started(home: Path, clean_environment: None) -> None:
    services = named(small("a"), small("b"))
    stack.up(home, ["a"], services=services)
    before = dict(os.environ)
    with stack.running(home, services=services):
        assert settings().home == home
        assert [row.state for row in stack.status(home, services=services)] == ["healthy", "healthy"]
    assert dict(os.environ) == before
    assert [row.service for row in stack.status(home, services=services)] == ["a"]
    stack.down(home, services=services)


def test_the_predictor_is_a_process_of_its_own_when_asked_for(home: Path) -> None:
    ports = {"server": {"port": 1, "grpc": 2}}
    one = SERVICES["server"].command(Site(home=home, ports=ports, credentials={}))
    ports["predictor"] = {"port": 3, "grpc": 4}
    site = Site(home=home, ports=ports, credentials={})
    two, predictor = SERVICES["server"].command(site), SERVICES["predictor"].command(site)
    assert one[one.index("--role") + 1] == "all"
    assert "onerec=production" in one
    assert two[two.index("--role") + 1] == "transformer"
    assert "onerec" in two
    assert two[two.index("--predictor_host") + 1] == f"{HOST}:4"
    assert predictor[predictor.index("--role") + 1] == "predictor"
    assert "onerec-frozen=frozen" in predictor
    assert "predictor" not in stack.usual()
    assert set(stack.usual()) | {"predictor"} == set(SERVICES)


def test_a_running_server_is_not_split_behind_its_back(home: Path) -> None:
    services = named(small("server"), replace(small("predictor"), optional=True))
    assert stack.up(home, services=services) == ["server"]
    with pytest.raises(StackError, match="one process already"):
        stack.up(home, ["server", "predictor"], services=services)
    stack.down(home, services=services)
    assert set(stack.up(home, ["server", "predictor"], services=services)) == {"server", "predictor"}
    stack.down(home, services=services)


def listening(home: Path, accept: Callable[[str], bool]) -> set[int]:
    """Ports on which processes of ``home`` listen at an address that ``accept`` likes."""
    pids = {p.pid for entry in stack.entries(home) for p in processes.family(*_family(home, entry))}
    connections = (c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in pids)
    return {c.laddr.port for c in connections if accept(c.laddr.ip)}


def _family(home: Path, name: str) -> tuple[processes.Recorded, str]:
    return stack.entries(home)[name].recorded, stack.marker(home, name)


def loopback(address: str) -> bool:
    return address in ("127.0.0.1", "::1", "::ffff:127.0.0.1")


def test_real_storage_keeps_data_and_stays_on_loopback(home: Path, clean_environment: None) -> None:
    with stack.running(home, ["s3", "valkey"]):
        connect().put("kept/a", b"1")
        password = (home / "valkey" / "valkey.conf").read_text()
        assert settings().redis_password.get_secret_value() in password
        for file in (home / "credentials.json", home / "valkey" / "valkey.conf"):
            assert file.stat().st_mode & 0o777 == 0o600
        secrets = json.loads((home / "credentials.json").read_text()).values()
        shown = (home / "stack.json").read_text() + "".join(path.read_text() for path in (home / "logs").iterdir())
        assert not any(secret in shown for secret in secrets)
        chosen = {port for entry in stack.entries(home).values() for port in entry.ports.values()}
        deadline = time.monotonic() + 30  # SeaweedFS opens its last port, the admin's, after it serves S3
        while not (ports := listening(home, loopback)) >= chosen and time.monotonic() < deadline:
            time.sleep(0.1)
        assert ports == chosen
        assert listening(home, lambda address: not loopback(address)) == set()
    assert left(home) == []
    assert all(processes.is_free(port) for port in ports)
    assert not [path for port in ports for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")]
    with stack.running(home, ["s3"]):
        assert connect().get("kept/a") == b"1"


RAY_JOB = """
import ray, os
ray.init(log_to_driver=False)
@ray.remote
def home():
    import features.settings
    return str(features.settings.settings().home)
print(ray.get(home.remote()))
"""


def test_the_whole_platform(home: Path, clean_environment: None) -> None:
    names = stack.usual()
    with stack.running(home):
        assert [row.state for row in stack.status(home)] == ["healthy"] * len(names)
        assert all(row.memory_bytes > 0 for row in stack.status(home))
        assert {name: model.ready for name, model in stack.models(home).items()} == dict.fromkeys(MODELS, False)
        job = subprocess.run([sys.executable, "-c", RAY_JOB], capture_output=True, text=True, timeout=180, check=False)
        assert job.stdout.strip() == str(home), job.stderr[-2000:]
        assert listening(home, lambda address: not loopback(address)) == set()
        ports = listening(home, loopback)
    assert left(home) == []
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(home) in " ".join(p.info["cmdline"] or [])]
    assert all(processes.is_free(port) for port in ports)


def test_a_folder_that_never_was_a_home_is_not_wiped(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    with pytest.raises(StackError, match="holds work, but no local services were ever started in it"):
        stack.wipe(tmp_path)
    assert (tmp_path / "work" / "thesis.txt").exists()
    (tmp_path / "credentials.json").write_text("{}")
    stack.wipe(tmp_path)
    assert not (tmp_path / "work").exists()
    stack.wipe(tmp_path / "new")
