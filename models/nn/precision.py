"""Where autocast is on, and how to switch it off: the parts of a model that must be exact in fp32."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def exact(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off; the meta device, on which models are only counted, has none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def compute_dtype(device: torch.device, given: torch.dtype) -> torch.dtype:
    """What a matrix product on ``device`` computes in under the current autocast, for operators it does not know."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return given
