"""``python -m models.serving --port 8080 --model onerec=production``: the model server, one process, several models.

``--role all`` (the default) looks features up and runs the model; ``transformer`` and ``predictor`` do one of the two
each, in two processes; ``rollout`` is ``all`` on one version's weights, or those that a trainer pushes. Addresses and
credentials come from the settings (``ONEREC_*``). Left out: several workers (each would hold its own model; run more
replicas instead).
"""

import argparse
import contextlib
import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from features.online import OnlineFeatures
from features.settings import Settings, settings
from features.storage import connect
from models.bundle import VERSION
from models.serving import admission
from models.serving.arenas import share_arenas
from models.serving.events import ServedLog
from models.serving.logs import configure_logging
from models.serving.lookup import FeatureLookup
from models.serving.predictor import BUCKETS, Predictor, PredictorModel
from models.serving.reload import Follower
from models.serving.remote import RemotePredictor
from models.serving.rest import ServedModel
from models.serving.rollout import Pinned
from models.serving.server import Listening, Server
from models.serving.telemetry import Telemetry
from models.serving.trainer import RolloutModel
from models.serving.transformer import Asked, OneRecModel

AT_LEAST: dict[str, float] = {"threads": 0, "batch_threads": 1, "max_batch": 1, "batch_ms": 1, "max_wait_ms": 0}
AT_LEAST |= {"queue_rows": 1, "queue_ms": 1, "timeout_ms": 1, "feature_budget_ms": 0, "cached_events": 0}
AT_LEAST |= {"drain_s": 0, "keep_bundles": 0}
"""Of each option that is a number."""
ROLES = ("all", "transformer", "predictor", "rollout")

log = logging.getLogger("models.serving")


def _pair(text: str) -> tuple[str, str]:
    name, _, served = text.partition("=")
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name) or not re.fullmatch(rf"|[a-z0-9][a-z0-9-]*|{VERSION}", served):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=ALIAS, such as onerec=production")
    return name, served


def _buckets(text: str) -> tuple[int, ...]:
    bounds = [int(part) if part.isdigit() else 0 for part in text.split(",")]
    if min(bounds) < 1 or sorted(set(bounds)) != bounds:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of rising context lengths, such as 128,512")
    return tuple(bounds)


def _arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m models.serving", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--role", choices=ROLES, default="all")
    add("--predictor_host", default="", metavar="HOST:PORT", help="role transformer: the predictor's gRPC address")
    add("--host", default="127.0.0.1")
    add("--port", "--http_port", type=int, default=8080, help="HTTP (v1 and v2)")
    add("--grpc_port", type=int, default=8081, help="gRPC (v2)")
    add(
        "--model",
        type=_pair,
        action="append",
        metavar="NAME=ALIAS",
        help="may be given several times; role transformer: NAME alone; role rollout: NAME=VERSION",
    )
    add("--model_name", default="onerec", help="KServe gives it: the name served when there is no --model")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--bf16", action="store_true", help="bf16 weights, run under bf16 autocast")
    add("--cuda_graphs", action="store_true", help="replay beam searches on a GPU; never yet run on one")
    add("--threads", type=int, default=0, help="CPU threads of the model (0: PyTorch's choice)")
    add("--batch_threads", type=int, default=1, help="of these, how many run one batch together; a GPU runs one batch")
    _add_limits(parser)
    return _checked(parser, parser.parse_args(given))


def _add_limits(parser: argparse.ArgumentParser) -> None:
    add, limits = parser.add_argument, admission.Limits()
    add("--max_batch", type=int, default=limits.max_rows, help="users of one run of the model; 1: no batching")
    add("--batch_ms", type=float, default=1000 * limits.batch_s, help="estimated time of one run at most")
    add("--max_wait_ms", type=float, default=1000 * limits.max_wait_s, help="how long a call waits for company")
    add("--buckets", type=_buckets, default=BUCKETS, help="context lengths up to which calls share a batch")
    add("--queue_rows", type=int, default=limits.queue_rows, help="users that may wait; beyond: 429")
    add("--queue_ms", type=float, default=1000 * limits.queue_s, help="estimated wait at most; beyond: 429")
    add("--timeout_ms", type=int, default=10_000, help="deadline of a request that brings none")
    add("--feature_budget_ms", type=float, default=150.0, help="then the answer comes without the feature store")
    add("--cached_events", type=int, default=1_000_000, help="events of remembered contexts, for when it is away")
    add("--drain_s", type=float, default=0.0, help="time between 'not ready' and closing the door on SIGTERM")
    add("--keep_bundles", type=int, default=2, help="bundles kept on disk beside those in service")


def _checked(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> argparse.Namespace:
    role = arguments.role
    for name, least in AT_LEAST.items():
        if not getattr(arguments, name) >= least:  # nor is NaN
            parser.error(f"--{name} is {getattr(arguments, name)}; it must be at least {least}")
    arguments.threads = arguments.threads or torch.get_num_threads()
    if (role == "transformer") != bool(arguments.predictor_host):
        parser.error("--predictor_host goes with --role transformer, which needs it")
    if arguments.predictor_host and not re.fullmatch(r"[^:/]+:\d+", arguments.predictor_host):
        parser.error(f"--predictor_host {arguments.predictor_host!r} is not HOST:PORT")
    name = arguments.model_name
    default = {"transformer": [(name, "")], "rollout": []}
    arguments.model = arguments.model or default.get(role, [(name, "production")])
    names = [each for each, _ in arguments.model]
    if len(set(names)) < len(names):
        parser.error(f"--model gives a name twice: {', '.join(names)}; each is served under a name of its own")
    named = all(bool(served) == (role != "transformer") for _, served in arguments.model)
    pinned = [bool(re.fullmatch(VERSION, served)) for _, served in arguments.model]
    if role == "rollout" and not (arguments.model and all(pinned)):
        parser.error("role rollout never follows an alias: give --model NAME=VERSION (`onerec bundles list`)")
    if role != "rollout" and (not named or any(pinned)):
        parser.error("--model is NAME=ALIAS; for role transformer NAME alone; for role rollout NAME=VERSION")
    return arguments


def _limits(arguments: argparse.Namespace) -> admission.Limits:
    return admission.Limits(
        max_rows=arguments.max_batch,
        batch_s=arguments.batch_ms / 1000,
        max_wait_s=arguments.max_wait_ms / 1000,
        queue_rows=arguments.queue_rows,
        queue_s=arguments.queue_ms / 1000,
        at_once=_at_once(arguments),
    )


def _at_once(arguments: argparse.Namespace) -> int:
    """Batches that run at a time.

    Two batches on a thread each are done sooner than two in turn on both: a narrow beam's operations are too small to
    be worth the meeting of threads after each (docs/log.md).
    """
    if arguments.device != "cpu":
        return 1
    return max(1, arguments.threads // arguments.batch_threads)


def _model_threads(arguments: argparse.Namespace) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(
        _at_once(arguments), "model", initializer=torch.set_num_threads, initargs=(arguments.batch_threads,)
    )


class Process:
    """What one process holds: its predictors, its look-up of features, its log of served events."""

    def __init__(self, arguments: argparse.Namespace, config: Settings) -> None:
        self._arguments = arguments
        self._home = config.home.absolute()
        role = arguments.role
        shown = role in ("all", "transformer")
        token = config.server_token.get_secret_value()
        self.served = ServedLog(config.collector_url, token, self._home / "served") if shown else None
        self._threads = _model_threads(arguments)
        self.sources: list[Follower | Pinned] = []
        if role != "transformer":
            self.sources = [self._source(name, served) for name, served in arguments.model]

    def _source(self, name: str, served: str) -> Follower | Pinned:
        a, cache = self._arguments, self._home / "bundles"
        if a.role == "rollout":
            return Pinned(name, served, connect(), cache, device=a.device, bf16=a.bf16)
        return Follower(
            *(name, served, connect(), cache),
            device=a.device,
            bf16=a.bf16,
            cuda_graphs=a.cuda_graphs,
            warm_up=a.buckets,
            threads=self._threads,
            keep=a.keep_bundles,
        )

    def models(self) -> list[ServedModel]:
        """One for every served name."""
        a = self._arguments
        predictors = [Predictor(each, self._threads, limits=_limits(a), buckets=a.buckets) for each in self.sources]
        if a.role == "predictor":
            return [PredictorModel(each, a.timeout_ms) for each in predictors]
        lookup = FeatureLookup(
            OnlineFeatures.connect,
            ThreadPoolExecutor(1, "features"),
            budget_s=a.feature_budget_ms / 1000,
            events=a.cached_events,
        )
        lookup.open()
        if a.role == "rollout":
            return [RolloutModel(each, lookup, each.source.telemetry, a.timeout_ms) for each in predictors]
        asked: list[tuple[Asked, Telemetry]] = [(each, each.source.telemetry) for each in predictors]
        if a.role == "transformer":
            asked = [(RemotePredictor(name, a.predictor_host), Telemetry(name)) for name, _ in a.model]
        return [OneRecModel(each, lookup, self.served, telemetry, a.timeout_ms) for each, telemetry in asked]

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Sources look for versions until the block ends; then what was served is delivered."""
        for source in self.sources:
            source.start()
        try:
            yield
        finally:
            for source in self.sources:
                source.stop()
            if self.served is not None:
                self.served.close()
                log.info("stopped; %d served events are on disk for the collector", self.served.spooled)


def main(given: list[str] | None = None) -> None:
    """Serves until SIGTERM or SIGINT, then answers what it has accepted and delivers the served events."""
    arguments, config = _arguments(given), settings()
    share_arenas()
    configure_logging()
    torch.set_num_threads(arguments.threads)  # of whatever computes beside the batches, such as a trainer's push
    process = Process(arguments, config)
    listening = Listening(
        host=arguments.host, port=arguments.port, grpc_port=arguments.grpc_port, drain_s=arguments.drain_s
    )
    weights = Path(config.home.absolute(), "pushed")
    server = Server(listening, process.served, config.admin_token.get_secret_value(), weights)
    with process.following():
        server.start(process.models())


if __name__ == "__main__":
    main()
