"""Where a worker computes: its device, threads, memory and precision, and its place among the workers."""

import ctypes
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**31 - 1


def prepare_device(threads: int, workers_here: int = 1) -> torch.device:
    """This worker's device: CUDA when there is one, else the CPU with ``threads`` threads (0: see ``FitConfig``)."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    # OpenMP threads spin at every barrier by default: with the other core busy, two of them trained 27 times slower
    # than one. With OMP_WAIT_POLICY=PASSIVE in the environment they sleep instead.
    passive = os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
    share = len(os.sched_getaffinity(0)) // workers_here if passive else 1
    torch.set_num_threads(threads or max(share, 1))
    keep_memory()
    return torch.device("cpu")


def keep_memory() -> None:
    """Lets glibc keep freed memory for the next step instead of giving it back.

    By default every tensor above 32 MB is mapped anew, and touching its pages for the first time costs more than the
    arithmetic: an RMSNorm over 16 000 rows of 512 took 43 ms and takes 12.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, KEPT_BYTES // 2)
            mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 autocast when asked for, or when ``auto`` finds hardware for it."""
    if halves(precision, device):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def halves(precision: str, device: torch.device) -> bool:
    """Whether ``precision`` means bf16 on this device."""
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_multiplies_bf16()
    return precision == "bf16" or (precision == "auto" and fast)


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 matrix instructions (AVX512-BF16 or AMX)."""
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@cache
def peak_flops(precision: str, device: torch.device, size: int = 1024, repeats: int = 4) -> float:
    """FLOP/s of a square product as training multiplies: what model FLOPs utilisation is measured against."""
    dtype = torch.bfloat16 if halves(precision, device) else torch.float32
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def rank() -> int:
    """This worker's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many workers train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(*values: float) -> list[float]:
    """Each value summed over the workers."""
    if world() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(sums)
    found: list[float] = sums.tolist()
    return found


def barrier() -> None:
    """Waits for the other workers."""
    if world() > 1:
        dist.barrier()
