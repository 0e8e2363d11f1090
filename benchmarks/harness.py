"""What every benchmark shares: the machine's name and limits, paired timing, the table and the last line of JSON.

Left out: statistics of experiments over users (``monitoring.experiment``).
"""

import hashlib
import json
import os
import platform
import re
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table


def hardware() -> str:
    """One line: processor, cores, memory and GPU."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    gigabytes = psutil.virtual_memory().total / 2**30
    return f"{os.cpu_count()} cores ({model}), {gigabytes:.0f} GB, {_gpu()}"


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def command() -> str:
    """The command line that started this benchmark, as a reader would type it."""
    return f"python -m benchmarks.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}".strip()


def matmul_peak(dtype: str = "bfloat16", size: int = 2048, repeats: int = 10) -> float:
    """FLOP/s of the best of ``repeats`` square products in ``dtype`` on this machine: the limit for models."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))

    def product() -> None:
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()

    product()
    return float(2 * size**3 / min(seconds(product) for _ in range(repeats)))


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(works: Sequence[Callable[[], object]], repeats: int = 5) -> np.ndarray:
    """float64 [repeats, len(works)] seconds; rivals take turns, so that a slow spell of the machine hits all alike."""
    return np.array([[seconds(work) for work in works] for _ in range(repeats)])


class PeakMemory:
    """Highest resident bytes of this process and its children inside a ``with`` block, sampled every 20 ms."""

    def __enter__(self) -> "PeakMemory":
        self.process, self.stop = psutil.Process(), threading.Event()
        self.before = self.peak = self._resident()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.thread.join()

    @property
    def gigabytes(self) -> float:
        """Peak in GB (10^9 bytes)."""
        return self.peak / 1e9

    def _watch(self) -> None:
        while not self.stop.wait(0.02):
            self.peak = max(self.peak, self._resident())

    def _resident(self) -> int:
        total = self.process.memory_info().rss
        for child in self.process.children(recursive=True):
            try:
                total += child.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return int(total)


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Slope of log time against log size: 1 is linear."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def spread(values: Iterable[float]) -> dict[str, float]:
    """Mean and sample standard deviation over seeds (0 for a single one)."""
    found = np.asarray(list(values), float)
    return {"mean": float(found.mean()), "std": float(found.std(ddof=1)) if len(found) > 1 else 0.0}


def place(output: Path, name: str, of: Any) -> Path:
    """Folder below ``output`` of what is called ``name`` and made of ``of`` (JSON values): other inputs, another."""
    digest = hashlib.sha256(json.dumps(of, sort_keys=True, default=str).encode()).hexdigest()
    return output / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{digest[:8]}"


def kept(output: Path, name: str, of: Any, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """The record that ``work(folder)`` returned for these inputs, now or in an earlier run: stored when it is done.

    ``folder`` is ``place(output, name, of)``; a killed run finds there what it left.
    """
    folder = place(output, name, of)
    path = folder / "record.json"
    if path.exists():
        stored: dict[str, Any] = json.loads(path.read_text())
        return stored
    folder.mkdir(parents=True, exist_ok=True)
    record = {**work(folder), "of": of}
    text = json.dumps(record, default=float)
    path.with_suffix(".part").write_text(text)
    path.with_suffix(".part").rename(path)
    return dict(json.loads(text))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints one table to stderr; floats with four significant digits."""
    shown = Table(title=title)
    for index, column in enumerate(columns):
        shown.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        shown.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(stderr=True, width=max(120, 16 * len(columns))).print(shown)


def finish(record: dict[str, Any]) -> None:
    """Prints what ran where, and ``record`` as the last line: one JSON object."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{command()}; {hardware()}; peak resident memory {peak / 1e6:.1f} GB", file=sys.stderr)
    sys.stderr.flush()
    print(json.dumps(record, default=float), flush=True)
