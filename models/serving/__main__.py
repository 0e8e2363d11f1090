"""``python -m models.serving --port 8080 --model onerec=production``: the model server, one process, several models.

Each ``--model NAME=ALIAS`` serves the bundle that the alias names and follows it. Addresses and credentials come from
the settings (``ONEREC_*``). Left out: several workers (each would hold its own model; run more replicas instead).
"""

import argparse
import logging
import re

import torch

from features.online import OnlineFeatures
from features.settings import settings
from features.storage import connect
from models.serving.events import ServedLog
from models.serving.predictor import FeatureSource, OneRecModel, Threads
from models.serving.reload import Follower
from models.serving.server import Server

log = logging.getLogger("models.serving")


def _pair(text: str) -> tuple[str, str]:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*=[a-z0-9][a-z0-9-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=ALIAS, such as onerec=production")
    name, alias = text.split("=")
    return name, alias


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m models.serving", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080, help="HTTP (v1 and v2)")
    parser.add_argument("--grpc_port", type=int, default=8081, help="gRPC (v2)")
    parser.add_argument("--model", type=_pair, action="append", metavar="NAME=ALIAS", help="may be given several times")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="run the model under bf16 autocast")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of the model (0: PyTorch's choice)")
    return parser.parse_args()


def main() -> None:
    """Serves until SIGTERM or SIGINT, then answers what it has accepted and delivers the served events."""
    arguments = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    config, storage = settings(), connect()
    home = config.home.absolute()
    served = ServedLog(config.collector_url, config.server_token.get_secret_value(), home / "served")
    threads, features = Threads(), FeatureSource(OnlineFeatures.connect)
    followers = [
        Follower(name, alias, storage, home / "bundles", device=arguments.device, bf16=arguments.bf16)
        for name, alias in arguments.model or [("onerec", "production")]
    ]
    server = Server(arguments.host, arguments.port, arguments.grpc_port, served)
    for follower in followers:
        follower.start()
    try:
        server.start([OneRecModel(follower, features, served, threads) for follower in followers])
    finally:
        for follower in followers:
            follower.stop()
        served.close()
        log.info("stopped; %d served events are on disk for the collector", served.spooled)


if __name__ == "__main__":
    main()
