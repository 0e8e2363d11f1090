"""Memory that stays flat: glibc's allocator gives each thread an arena of its own, and what is freed stays in it.

A server frees in one thread what another has made; with two arenas for all, freed memory is used again by whoever asks
next. Left out: other allocators, which know no ``mallopt``.
"""

import ctypes
import sys

M_ARENA_MAX = -8
"""Of glibc's malloc.h."""


def share_arenas() -> None:
    """Call it before there are many threads; the variable MALLOC_ARENA_MAX says the same from outside."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_ARENA_MAX, 2)
