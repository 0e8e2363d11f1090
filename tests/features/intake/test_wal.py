import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.intake.wal import Segment, WalFailed, WalFull, WalLimits, WriteAheadLog, header, scan


def frame(payload: bytes) -> bytes:
    return header(payload) + payload


payloads = st.lists(st.binary(min_size=1, max_size=60), max_size=8)


def opened(folder: Path, **limits: Any) -> tuple[WriteAheadLog, list[Segment]]:
    segments: list[Segment] = []
    return WriteAheadLog(folder, segments.append, WalLimits(**limits)), segments


def records(segments: list[Segment]) -> list[bytes]:
    return [record for segment in segments for record in segment.records()]


@settings(max_examples=200)
@given(payloads, st.binary(max_size=40), st.data())
def test_a_torn_tail_loses_only_the_record_it_cuts(written: list[bytes], garbage: bytes, data: st.DataObject) -> None:
    frames = [frame(payload) for payload in written]
    log = b"".join(frames)
    cut = data.draw(st.integers(0, len(log)))
    whole, size = scan(log[:cut])
    assert whole == written[: len(whole)]
    assert size == sum(len(f) for f in frames[: len(whole)]) <= cut
    assert cut - size < (len(frames[len(whole)]) if len(whole) < len(frames) else 1)
    assert scan(log + b"\0" * len(garbage))[0] == written


@settings(max_examples=200)
@given(st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=6), st.data())
def test_a_flipped_bit_is_never_replayed(written: list[bytes], data: st.DataObject) -> None:
    log = bytearray(b"".join(frame(payload) for payload in written))
    at = data.draw(st.integers(0, len(log) * 8 - 1))
    log[at // 8] ^= 1 << at % 8
    assert scan(bytes(log))[0] == written[: len(scan(bytes(log))[0])]
    assert len(scan(bytes(log))[0]) < len(written)


@settings(max_examples=20)
@given(payloads, payloads, st.binary(max_size=20).filter(lambda torn: not torn.startswith(b"d")))
def test_what_was_acknowledged_is_replayed_after_a_torn_write(
    first: list[bytes], second: list[bytes], torn: bytes
) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        log, segments = opened(folder, segment_seconds=100)
        for payload in first:
            log.append(payload).result(5)
        log.close()
        for segment in segments[-1:]:
            # Without its last byte, a d: with it the record would be whole, and rightly replayed.
            segment.path.write_bytes(segment.path.read_bytes() + frame(b"never acknowledged")[:-1] + torn)
        log, replayed = opened(folder, segment_seconds=100)
        assert records(replayed) == first
        for payload in second:
            log.append(payload).result(5)
        log.close()
        assert records(replayed) == first + second
        assert len({segment.number for segment in replayed}) == len(replayed)


def test_segments_are_sealed_by_size_by_age_and_on_request(tmp_path: Path) -> None:
    log, segments = opened(tmp_path, segment_bytes=100, segment_seconds=1000)
    with log:
        log.append(b"x" * 200).result(5)
        log.append(b"y").result(5)
        log.seal().result(5)
        log.seal().result(5)
    assert [segment.records() for segment in segments] == [[b"x" * 200], [b"y"]]

    aged = threading.Event()
    with WriteAheadLog(tmp_path / "aged", lambda segment: aged.set(), WalLimits(segment_seconds=0.05)) as log:
        log.append(b"z").result(5)
        assert aged.wait(10)


def test_waiting_callers_share_one_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushes: list[int] = []
    entered, proceed, flush = threading.Event(), threading.Event(), os.fdatasync

    def slow(file: int) -> None:
        entered.set()
        proceed.wait(10)
        flushes.append(file)
        flush(file)

    monkeypatch.setattr(os, "fdatasync", slow)
    log, segments = opened(tmp_path, segment_seconds=1000)
    with log:
        first = log.append(b"first")
        assert entered.wait(10)
        others = [log.append(str(n).encode()) for n in range(50)]
        assert not first.done()
        proceed.set()
        for future in [first, *others]:
            future.result(10)
        assert len(flushes) == 2
    assert records(segments) == [b"first", *(str(n).encode() for n in range(50))]


def test_nothing_is_acknowledged_when_the_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, segments = opened(tmp_path, segment_seconds=1000)
    with log:
        log.append(b"good").result(5)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(WalFailed, match="No space left"):
                log.append(b"bad").result(5)
        assert log.failure
        log.append(b"again").result(5)
        assert log.failure is None
    assert records(segments) == [b"good", b"again"]


def test_concurrent_writers_lose_nothing(tmp_path: Path) -> None:
    log, segments = opened(tmp_path, segment_bytes=2000)
    sent = [f"{n}".encode() * 10 for n in range(400)]
    with log, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda payload: log.append(payload).result(10), sent))
    assert sorted(records(segments)) == sorted(sent)
    assert len(segments) > 1


def test_limits_locks_and_closed_logs_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, _ = opened(tmp_path, waiting_bytes=50)
    with pytest.raises(RuntimeError, match="another process"):
        opened(tmp_path)
    with pytest.raises(WalFull, match="at most 50"):
        log.append(b"x" * 60)
    with pytest.raises(ValueError, match="empty"):
        log.append(b"")
    log.close()
    with pytest.raises(WalFailed, match="closed"):
        log.append(b"late")
    with pytest.raises(ValueError, match="segment_bytes"):
        WalLimits(segment_bytes=0)
