"""Object storage: one bucket behind the S3 protocol, always through the ``minio`` client.

Immutable objects use content-addressed keys, so a repeated upload overwrites itself harmlessly; the few
mutable pointers have one writer each, or are swapped by comparison (docs/decisions/0002-object-storage.md).
"""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import urllib3
from minio import Minio
from minio.error import S3Error

from features.settings import Settings, settings

TIMEOUT = urllib3.Timeout(connect=3, read=30)


class StorageUnavailable(RuntimeError):
    """The object store did not answer; the message says which endpoint and what to do."""


class ObjectMissing(KeyError):
    """No object has this key."""


class ObjectChanged(RuntimeError):
    """Somebody else wrote an object since it was read."""


@dataclass(frozen=True)
class Storage:
    """Reads and writes objects of one bucket. Every method raises StorageUnavailable when S3 is down."""

    client: Minio
    bucket: str
    endpoint: str

    def put(self, key: str, data: bytes, content_type: str = "application/octet-stream") -> str:
        """Writes ``data`` under ``key``; returns its sha256."""
        with self._reporting(key):
            self.client.put_object(self.bucket, key, io.BytesIO(data), len(data), content_type=content_type)
        return hashlib.sha256(data).hexdigest()

    def get(self, key: str) -> bytes:
        """The bytes under ``key``; raises ObjectMissing."""
        return self._read(key)

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """``length`` bytes under ``key`` from ``offset`` on; raises ObjectMissing."""
        return self._read(key, offset, length)

    def tagged(self, key: str) -> tuple[bytes, str] | None:
        """The bytes under ``key`` and their entity tag, for ``swap``; None when there is no such object."""
        try:
            with self._reporting(key):
                response = self.client.get_object(self.bucket, key)
                try:
                    return response.read(), response.headers["ETag"]
                finally:
                    response.close()
                    response.release_conn()
        except ObjectMissing:
            return None

    def swap(self, key: str, data: bytes, tag: str | None) -> None:
        """Writes ``data`` if the object still has entity tag ``tag`` (None: if there is none); raises ObjectChanged.

        S3's conditional write, on a presigned address because the client's own writes cannot carry the condition.
        """
        condition = {"If-Match": tag} if tag else {"If-None-Match": "*"}
        with self._reporting(key):
            url = self.client.get_presigned_url("PUT", self.bucket, key, expires=timedelta(minutes=1))
            headers = {**condition, "content-type": "application/json"}
            answer = urllib3.request("PUT", url, body=data, headers=headers, timeout=TIMEOUT, retries=False)
        gone = answer.status == HTTPStatus.NOT_FOUND and tag is not None
        if gone or answer.status in (HTTPStatus.PRECONDITION_FAILED, HTTPStatus.CONFLICT):
            raise ObjectChanged(f"{key!r} at {self.endpoint} was written by somebody else since it was read")
        if answer.status != HTTPStatus.OK:
            raise StorageUnavailable(f"S3 at {self.endpoint} refused {key!r}: status {answer.status}")

    def put_json(self, key: str, value: Any) -> str:
        """Writes ``value`` as readable JSON; returns its sha256."""
        return self.put(key, json_bytes(value), "application/json")

    def get_json(self, key: str) -> Any:
        """The JSON value under ``key``; raises ObjectMissing."""
        return json.loads(self.get(key))

    def put_table(self, key: str, table: pa.Table) -> str:
        """Writes ``table`` as zstd Parquet; returns the sha256 of the file."""
        return self.put(key, table_bytes(table), "application/vnd.apache.parquet")

    def get_table(self, key: str, columns: list[str] | None = None) -> pa.Table:
        """The Parquet table under ``key``; raises ObjectMissing."""
        return pq.read_table(pa.BufferReader(self.get(key)), columns=columns)

    def put_file(self, key: str, path: Path) -> None:
        """Uploads the file at ``path``, in parts when it is large; it is never read into memory whole."""
        with self._reporting(key):
            self.client.fput_object(self.bucket, key, str(path))

    def get_file(self, key: str, path: Path) -> None:
        """Downloads the object to ``path``; raises ObjectMissing."""
        with self._reporting(key):
            self.client.fget_object(self.bucket, key, str(path))

    def put_folder(self, prefix: str, folder: Path) -> None:
        """Uploads every file below ``folder`` under ``prefix/``."""
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def get_folder(self, prefix: str, folder: Path) -> Path:
        """Downloads every object under ``prefix/`` into ``folder``; raises ObjectMissing when there is none."""
        keys = list(self.keys(f"{prefix}/"))
        if not keys:
            raise ObjectMissing(f"nothing is stored under {prefix}/")
        for key in keys:
            path = folder / key.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.get(key))
        return folder

    def keys(self, prefix: str) -> Iterator[str]:
        """Keys that begin with ``prefix``, in lexical order."""
        with self._reporting(prefix):
            listed = [o.object_name for o in self.client.list_objects(self.bucket, prefix=prefix, recursive=True)]
        return iter(sorted(name for name in listed if name is not None))

    def folders(self, prefix: str) -> list[str]:
        """Names of what lies directly below ``prefix`` and holds more: one each, however much it holds."""
        with self._reporting(prefix):
            listed = [o.object_name for o in self.client.list_objects(self.bucket, prefix=prefix) if o.is_dir]
        return sorted(str(name).removeprefix(prefix).rstrip("/") for name in listed)

    def objects(self, prefix: str) -> list[tuple[str, int, datetime]]:
        """Key, bytes and time of the last change of every object whose key begins with ``prefix``, by key."""
        with self._reporting(prefix):
            listed = list(self.client.list_objects(self.bucket, prefix=prefix, recursive=True))
        return sorted((str(o.object_name), int(o.size or 0), o.last_modified) for o in listed if o.last_modified)

    def exists(self, key: str) -> bool:
        """Whether an object has this key."""
        try:
            with self._reporting(key):
                self.client.stat_object(self.bucket, key)
        except ObjectMissing:
            return False
        return True

    def remove(self, key: str) -> None:
        """Removes the object; no error when it is absent."""
        with self._reporting(key):
            self.client.remove_object(self.bucket, key)

    def ensure_bucket(self) -> None:
        """Creates the bucket when it is absent."""
        with self._reporting(self.bucket):
            if not self.client.bucket_exists(self.bucket):
                self.client.make_bucket(self.bucket)

    def _read(self, key: str, offset: int = 0, length: int = 0) -> bytes:
        """A ``length`` of 0 means up to the end."""
        with self._reporting(key):
            response = self.client.get_object(self.bucket, key, offset=offset, length=length)
            try:
                return response.read()
            finally:
                response.close()
                response.release_conn()

    def _reporting(self, key: str) -> "_Reporting":
        return _Reporting(self.endpoint, key)


@dataclass(frozen=True)
class _Reporting:
    """Turns the client's errors into ours, with the endpoint and what to do."""

    endpoint: str
    key: str

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, S3Error):
            if error.code in ("NoSuchKey", "NoSuchObject", "NoSuchBucket"):
                raise ObjectMissing(f"no object {self.key!r} at {self.endpoint} ({error.code})") from error
            raise StorageUnavailable(f"S3 at {self.endpoint} refused {self.key!r}: {error.code}") from error
        if isinstance(error, urllib3.exceptions.HTTPError | OSError):
            raise StorageUnavailable(
                f"S3 at {self.endpoint} does not answer ({type(error).__name__}); "
                "see `onerec status`, or start it with `onerec up`"
            ) from error


def json_bytes(value: Any) -> bytes:
    """``value`` as readable JSON; equal values give equal bytes."""
    return json.dumps(value, indent=1, sort_keys=True, default=str).encode()


def table_bytes(table: pa.Table) -> bytes:
    """``table`` as zstd-compressed Parquet bytes; equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def connect(config: Settings | None = None) -> Storage:
    """Storage at the configured endpoint; connections fail within seconds instead of minutes."""
    config = config or settings()
    http = urllib3.PoolManager(timeout=TIMEOUT, maxsize=16, retries=urllib3.Retry(total=2, backoff_factor=0.2))
    client = Minio(
        endpoint=config.s3_endpoint,
        access_key=config.s3_access_key.get_secret_value() or None,
        secret_key=config.s3_secret_key.get_secret_value() or None,
        secure=config.s3_secure,
        http_client=http,
        region="us-east-1",
    )
    return Storage(client, config.bucket, config.s3_endpoint)
