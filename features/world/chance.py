"""Counter-based random numbers: each is a pure function of what it decides, never of what was drawn before.

Two policies compared in the same world therefore meet the same luck wherever they show the same item to the same user
in the same place (common random numbers), and a world needs no stored generator. The mixing step is splitmix64
(Steele, Lea and Flood, OOPSLA 2014).
"""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)
_SCALE = 1.0 / (1 << 53)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> _S30)) * _MIX_1
    x = (x ^ (x >> _S27)) * _MIX_2
    return x ^ (x >> _S31)


def uniforms(*keys: int | np.ndarray) -> np.ndarray:
    """Uniform numbers in (0, 1) of the broadcast shape of the integer ``keys``; equal keys give equal numbers."""
    state = np.zeros(1, np.uint64)
    for key in keys:
        state = _mix((state + _GOLDEN) ^ _mix(np.atleast_1d(np.asarray(key, np.int64)).view(np.uint64)))
    return ((state >> _S11) + 0.5) * _SCALE
