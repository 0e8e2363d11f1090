"""The crash test of ``benchmarks.intake``: kills under load, and the count of what was lost or doubled."""

import random
import signal
import sys
import time
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.intake_load import LoadConfig
from benchmarks.intake_servers import DAY, T0, Servers, begin_load, finish_load
from features.intake import exposures

_BODY_BYTES = 4_000
_THINK_S = 0.02


def crash(running: Servers, kills: int) -> dict[str, Any]:
    """Kills the collector ``kills`` times under load, S3 being away in most rounds; then counts."""
    config = LoadConfig(
        port=running.port, token="server", seconds=3600, time_ms=T0, body_bytes=_BODY_BYTES, think_s=_THINK_S
    )
    generator = begin_load(config)
    try:
        for number in range(1, kills + 1):
            _round(running, number)
            print(f"killed {number} of {kills}", file=sys.stderr)
    finally:
        generator.terminate()
        outcome = finish_load(generator)
    running.flush(300)
    return {"kills": kills, **_count(running, outcome)}


def _round(running: Servers, number: int) -> None:
    """One kill, with S3 killed, suspended or well beforehand."""
    time.sleep(random.uniform(0.1, 1.0))
    if number % 3 == 0:
        running.s3.stop()
    elif number % 3 == 1:
        running.s3.send(signal.SIGSTOP)
    time.sleep(random.uniform(0.0, 0.4))
    running.collector.stop()
    running.collector.start()
    time.sleep(random.uniform(0.1, 0.6))
    if number % 3 == 0:
        running.s3.start()
    elif number % 3 == 1:
        running.s3.send(signal.SIGCONT)


def _count(running: Servers, outcome: dict[str, Any]) -> dict[str, Any]:
    """Looks for every acknowledged event in S3, and for exposures that are there twice or wrong after the join."""
    acked, sent = _names(outcome, "acked"), _names(outcome, "sent")
    lost, stored = 0, 0
    for kind in ("impression", "feedback"):
        names = exposures.read_events(running.storage, kind, None, None).column("exposure_id")
        stored += len(names)
        lost += len(acked) - pc.sum(pc.is_in(acked, value_set=names.unique())).as_py()
    exposures.compact(running.storage, DAY, DAY + timedelta(hours=1))
    joined = exposures.read(running.storage, columns=["exposure_id", "play_ms"])
    names = joined.column("exposure_id")
    rows = pc.cast(pc.utf8_slice_codeunits(names, -3), pa.int64()).to_numpy()
    return {
        "acked": 2 * len(acked),
        "acked_lost": int(lost),
        "exposures": joined.num_rows,
        "stored_repeats": stored - 2 * joined.num_rows,
        "doubled_after_dedup": joined.num_rows - pc.count_distinct(names).as_py(),
        "wrong_feedback": int((joined.column("play_ms").to_numpy() != 7000 + rows).sum()),
        "made_up": int(pc.sum(pc.invert(pc.is_in(names, value_set=sent))).as_py() or 0),
        "refused": outcome["refused"],
        "broken_connections": outcome["broken"],
    }


def _names(outcome: dict[str, Any], which: str) -> pa.Array:
    """The exposure ids of the acknowledged (or sent) batches."""
    found = [
        np.char.add(f"{client:02d}-", np.char.zfill(np.arange(tally[which]).astype(str), 8))
        for client, tally in enumerate(outcome["clients"])
    ]
    rows = [f"-{row:03d}" for row in range(outcome["clients"][0]["rows"])]
    batches = np.concatenate(found)
    return pa.array(np.char.add(np.repeat(batches, len(rows)), np.tile(rows, len(batches))))
