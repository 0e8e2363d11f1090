"""Columns on disk: appended part by part, then read back memory-mapped as one array each.

An Arrow file keeps the batches it was written in, and an array that spans batches has to be copied to become one. So
columns grow in raw files first and become a file of a single batch at the end: numpy sees it without a copy, and
neither side ever holds a column in memory. Left out: nulls, and types other than numbers, fixed lists and strings.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa


class Growing:
    """Columns of ``schema`` (numbers, fixed-size lists of numbers, large strings) under construction in ``folder``."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.schema, self.rows = schema, 0
        self._folder = folder
        self._files = {f.name: (folder / f.name).open("wb") for f in schema}
        self._lengths = {f.name: (folder / f"{f.name}.n").open("wb") for f in schema if _is_string(f.type)}

    def append(self, columns: Mapping[str, np.ndarray | pa.Array]) -> None:
        """Adds rows; every column of the schema is given: numbers as numpy [n] or [n, size], strings as Arrow [n]."""
        sizes = {len(values) for values in columns.values()}
        assert len(sizes) == 1, "columns of one length"
        assert set(columns) == set(self.schema.names), "all columns of the schema"
        for field in self.schema:
            values = columns[field.name]
            if _is_string(field.type):
                self._append_strings(field.name, values)
                continue
            kind = field.type.value_type if pa.types.is_fixed_size_list(field.type) else field.type
            np.ascontiguousarray(values, kind.to_pandas_dtype()).tofile(self._files[field.name])
        self.rows += sizes.pop()

    def column(self, name: str) -> np.ndarray:
        """The numbers appended so far, mapped."""
        self._files[name].flush()
        field = self.schema.field(name).type
        return _map(self._folder / name, np.dtype(field.to_pandas_dtype()))

    def array(self, name: str) -> pa.Array:
        """The column as one Arrow array over the mapped file."""
        kind = self.schema.field(name).type
        self._files[name].flush()
        data = self._folder / name
        if _is_string(kind):
            self._lengths[name].flush()
            ends = np.cumsum(_map(self._folder / f"{name}.n", np.dtype(np.int64)))
            offsets = pa.py_buffer(np.r_[np.int64(0), ends])
            return pa.Array.from_buffers(kind, self.rows, [None, offsets, pa.py_buffer(_map(data, np.dtype(np.uint8)))])
        if pa.types.is_fixed_size_list(kind):
            flat = _numbers(kind.value_type, data)
            return pa.FixedSizeListArray.from_arrays(flat, kind.list_size)
        return _numbers(kind, data)

    def finish(self, path: Path) -> None:
        """Writes the Arrow file and removes the raw ones."""
        batch = pa.record_batch([self.array(name) for name in self.schema.names], schema=self.schema)
        with pa.ipc.new_file(path, self.schema) as file:
            file.write_batch(batch)
        self.discard()

    def discard(self) -> None:
        """Removes the raw files."""
        for file in (*self._files.values(), *self._lengths.values()):
            file.close()
        shutil.rmtree(self._folder)

    def _append_strings(self, name: str, values: pa.Array) -> None:
        if not len(values):
            return
        large = values.cast(pa.large_string())
        _, offsets, data = large.buffers()
        ends = np.frombuffer(offsets, np.int64)[large.offset : large.offset + len(large) + 1]
        np.diff(ends).tofile(self._lengths[name])
        if data is not None:
            self._files[name].write(memoryview(data)[ends[0] : ends[-1]])


def read_columns(path: Path) -> pa.RecordBatch:
    """The single batch of a file that ``Growing.finish`` wrote, memory-mapped."""
    with pa.memory_map(str(path)) as source:
        file = pa.ipc.open_file(source)
        if file.num_record_batches != 1:
            raise ValueError(f"{path} has {file.num_record_batches} batches; expected one, as the data stage writes it")
        return file.get_batch(0)


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_large_string(kind))


def _numbers(kind: pa.DataType, path: Path) -> pa.Array:
    values = _map(path, np.dtype(kind.to_pandas_dtype()))
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def _map(path: Path, kind: np.dtype) -> np.ndarray:
    return np.memmap(path, kind, "r") if path.stat().st_size else np.empty(0, kind)
