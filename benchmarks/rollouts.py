"""Roll-outs from a model server in the middle of training: samples a second, and the share of a step spent waiting.

``python -m benchmarks.rollouts [--quick]``. A real server process of role ``rollout`` gets contexts over HTTP, draws
groups and takes the trainer's weights every N steps; the rival is the sampler inside the training process, in the same
run. A step trains on the exposures of 64 requests (ten each; ``--quick``: 8 requests) and rolls out 8 requests of 512
behaviours, 32 samples each, by ECPO. Weights and contexts are random: time does not depend on what is known. Server and
trainer share the machine's cores here and would not in a cluster: what is waited for is mostly the server's model. Left
out: several servers.
"""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.harness import finish, seconds, table
from benchmarks.intake_servers import ROOT, Server, object_store
from benchmarks.random_catalogue import CODES, LENGTHS, LEVELS
from benchmarks.serving_servers import LIMITS, NOW, write_bundle
from features.histories.context import Context, Pathway
from features.settings import Settings
from features.storage import connect
from models.bundle import Bundle, publish
from models.pathways import PATHWAYS, to_tensors
from models.sizes import small, tiny
from models.training.alignment import AlignConfig
from models.training.on_policy import Asked, Logged, Rollouts, align_on_rollouts
from models.training.rollout_server import ServerSampler
from models.training.rollouts import InProcessSampler, Sampler
from pipelines.processes import free_ports

TARGETS = 10
TOKEN = "benchmark"
ARMS = {"process_10": 10, "server_10": 10, "server_1": 1}
"""Who draws, and how often it gets weights."""


def random_contexts(requests: int, items: int, seed: int = 0) -> Context:
    """Users with full pathways of random behaviours."""
    rng = np.random.default_rng(seed)

    def pathway(length: int) -> Pathway:
        shape = (requests, length)
        return Pathway(
            item=rng.integers(0, items, shape).astype(np.int32),
            age_s=np.sort(rng.integers(1, 10**6, shape), 1)[:, ::-1].astype(np.float32),
            play_ms=rng.integers(0, 60_000, shape).astype(np.float32),
            duration_ms=np.full(shape, 30_000, np.float32),
            labels=rng.integers(0, 512, shape).astype(np.int32),
        )

    parts = {name: pathway(length) for name, length in zip(PATHWAYS, LENGTHS, strict=True)}
    return Context(static=rng.integers(0, 1024, (requests, 8)), **parts)


@contextmanager
def rollout_server(store: Settings, version: str, folder: Path) -> Iterator[str]:
    """A server process of role ``rollout``; gives its address."""
    http, grpc = free_ports(2)
    command = [sys.executable, "-m", "models.serving", "--role", "rollout", "--model", f"onerec={version}"]
    command += ["--port", str(http), "--grpc_port", str(grpc), "--threads", str(torch.get_num_threads())]
    environment = {
        "ONEREC_HOME": str(folder / "home"),
        "ONEREC_S3_ENDPOINT": store.s3_endpoint,
        "ONEREC_S3_ACCESS_KEY": store.s3_access_key.get_secret_value(),
        "ONEREC_S3_SECRET_KEY": store.s3_secret_key.get_secret_value(),
        "ONEREC_BUCKET": store.bucket,
        "ONEREC_ADMIN_TOKEN": TOKEN,
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(ROOT),
    }
    url = f"http://127.0.0.1:{http}"
    server = Server(command, environment, f"{url}/v2/models/onerec/ready", folder / "server.log")
    try:
        server.start()
        yield url
    finally:
        server.stop(signal.SIGTERM)


def exposures(bundle: Bundle, requests: int) -> Logged:
    """A batch of random logged exposures."""
    n, rng = len(bundle.catalogue), np.random.default_rng(1)
    items = rng.integers(0, n, (requests, TARGETS))
    targets = torch.from_numpy(bundle.catalogue.sids.astype(np.int64)[items])
    mask = torch.ones(requests, TARGETS, dtype=torch.bool)
    return Logged(
        context=to_tensors(random_contexts(requests, n, 2), bundle.catalogue),
        targets=targets,
        mask=mask,
        weights=mask.float(),
        advantages=torch.full(mask.shape, torch.nan),
        old_log_probs=torch.full(targets.shape, torch.nan),
    )


def trained(bundle: Bundle, sampler: Sampler, every: int, steps: int, requests: int) -> dict[str, Any]:
    """The records of ``steps`` steps of ECPO with roll-outs from ``sampler``, and how long a push takes."""
    config = AlignConfig(
        objective="ecpo", signal="rollouts", group=32, rollout_requests=8, push_every=every, log_every=1
    )
    everybody, batch = random_contexts(256, len(bundle.catalogue)), exposures(bundle, requests)
    rollouts = Rollouts(
        asked=Asked(count=256, of=everybody.take),
        reward=lambda context, items, requests: items / len(bundle.catalogue),
        sampler=sampler,
        catalogue=bundle.catalogue,
    )
    model = bundle.model.requires_grad_(True)
    push_s = seconds(lambda: sampler.advance(model, 0))
    found = align_on_rollouts(model, config, rollouts=rollouts, logged=lambda number: batch, steps=steps)
    return {**found, "push_s": push_s}


def measured(found: dict[str, Any]) -> dict[str, float]:
    """Medians over the steps, the first two left out."""
    history = found["history"][2:]
    wait = np.array([record["rollouts/wait_s"] for record in history])
    whole = np.diff([record["seconds"] for record in found["history"][1:]])
    samples = 8 * 32
    return {
        "samples_per_s": float(samples / np.median(wait)),
        "wait_s": float(np.median(wait)),
        "step_s": float(np.median(whole)),
        "wait_share": float(wait.sum() / whole.sum()),
        "push_s": found["push_s"],
        "staleness": float(np.mean([record["rollouts/staleness"] for record in history])),
    }


def main(
    quick: Annotated[bool, typer.Option(help="Preset tiny, small batches and few steps: under two minutes.")] = False,
    steps: Annotated[int, typer.Option(help="Steps of each arm.", min=6)] = 24,
) -> None:
    """Trains with roll-outs from the process and from a server."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end with it
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    steps, items, requests = (6, 2_000, 8) if quick else (steps, 10_000, 64)
    size = (tiny if quick else small)(CODES, LEVELS)
    found: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onerec-rollouts-")))
        _, store = stack.enter_context(object_store(folder))
        storage = connect(store)
        storage.ensure_bucket()
        version = publish(storage, write_bundle(folder / "bundle", items, size, limits=LIMITS), data_time=NOW)
        url = stack.enter_context(rollout_server(store, version, folder))
        for arm, every in ARMS.items():
            print(f"{arm}: {steps} steps", file=sys.stderr, flush=True)
            bundle = Bundle.load(folder / "bundle")
            with closing(_sampler(arm, url, bundle, every)) as sampler:
                found[arm] = measured(trained(bundle, sampler, every, steps, requests))
    columns = tuple(found["server_1"])
    rows = [(arm, *values.values()) for arm, values in found.items()]
    table(f"Roll-outs, preset {'tiny' if quick else 'small'}, pushes every N steps", ("arm_N", *columns), rows)
    record = {f"{arm}_{name}": value for arm, values in found.items() for name, value in values.items()}
    finish({**record, "quick": quick})


def _sampler(arm: str, url: str, bundle: Bundle, every: int) -> Sampler:
    if arm.startswith("server"):
        return ServerSampler(url, TOKEN, bundle.catalogue, every=every)
    return InProcessSampler(bundle.model, bundle.catalogue, every=every)


if __name__ == "__main__":
    typer.run(main)
