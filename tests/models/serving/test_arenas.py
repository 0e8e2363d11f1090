import subprocess
import sys

import pytest

COUNT = """
import ctypes, re, sys, threading
from models.serving.arenas import share_arenas

if sys.argv[2] == "shared":
    share_arenas()
here = threading.Barrier(21)

def work():
    kept = [bytearray(10_000) for _ in range(20)]
    here.wait()
    here.wait()

for _ in range(20):
    threading.Thread(target=work).start()
here.wait()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
libc.malloc_info.argtypes, libc.fclose.argtypes = [ctypes.c_int, ctypes.c_void_p], [ctypes.c_void_p]
file = libc.fopen(sys.argv[1].encode(), b"w")
libc.malloc_info(0, file)
libc.fclose(file)
here.wait()
print(len(re.findall("<heap nr", open(sys.argv[1]).read())))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_all_threads_share_two_arenas(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)

    def arenas(how: str) -> int:
        command = [sys.executable, "-c", COUNT, str(tmp_path / "arenas.xml"), how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert arenas("shared") <= 2 < arenas("own")
