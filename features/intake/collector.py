"""The event collector: ``POST /v1/events`` answers 202 only when the batch is on disk.

Here is what starts it; the HTTP surface is ``features.intake.api``, the rest ``features.intake.intake``. Upload and
on-line features run in processes of their own (``features.intake.child``).
Run: ``python -m features.intake.collector --host 127.0.0.1 --port 8090 --wal .onerec/wal``.
"""

import argparse
import contextlib
import gc
import importlib.util
import logging
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import uvicorn

from features.intake.api import Api, check_tokens
from features.intake.child import Child
from features.intake.intake import Intake, IntakeConfig
from features.intake.worker import UPDATE, UPLOAD
from features.settings import settings


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m features.intake.collector", description="Collects events.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback)")
    parser.add_argument("--port", type=int, default=8090)
    parser.add_argument("--wal", type=Path, required=True, metavar="DIR", help="folder of the write-ahead log")
    parser.add_argument("--budget-mb", type=int, default=2048, help="disk for events that are not uploaded yet")
    parser.add_argument("--no-features", action="store_true", help="do not update the on-line features")
    parser.add_argument("--skew-days", type=float, default=2.0, help="event times farther from now are counted")
    parser.add_argument("--refuse-skewed", action="store_true", help="refuse them instead")
    return parser.parse_args(arguments)


def _config(options: argparse.Namespace) -> IntakeConfig:
    return IntakeConfig(
        wal=options.wal,
        budget_bytes=options.budget_mb * 1024**2,
        skew=timedelta(days=options.skew_days),
        refuse_skewed=options.refuse_skewed,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the collector until SIGTERM or Ctrl-C; returns 2 when it is misconfigured."""
    options = _arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        config = settings()
        client_token, server_token = config.client_token.get_secret_value(), config.server_token.get_secret_value()
        check_tokens(client_token, server_token)
        if not options.no_features and importlib.util.find_spec("feast") is None:
            raise ImportError("feast is not installed; install it, or give --no-features")
        update = None if options.no_features else Child(UPDATE, options.wal)
        intake = Intake(_config(options), Child(UPLOAD, options.wal), update)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        said = str(error)
        if isinstance(error, OSError) and error.filename:
            said = f"{error.filename} cannot be used: {error.strerror}"
        print(f"the collector cannot start: {said}", file=sys.stderr)
        return 2
    server = uvicorn.Config(
        Api(intake, client_token=client_token, server_token=server_token),
        host=options.host,
        port=options.port,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=10,
    )
    # What was imported stays: the collector of garbage need not look at it again while clients wait.
    gc.freeze()
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(server).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
