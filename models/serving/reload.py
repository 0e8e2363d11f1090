"""Follows an alias: the named bundle is fetched, verified, loaded and warmed up beside the running one, then swapped.

The swap is one assignment; requests keep the recommender they began with, so every answer comes from exactly one
version and the old one is freed when its last request is done. A bundle that is corrupt or does not load is refused
with the reason and the old one stays. Object storage that is away changes nothing except readiness of a model
that never loaded. Between bundles the follower applies the version's deltas the same way (``models.deltas``): new
items and take-downs give a new catalogue and trie around the same model.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from features.storage import ObjectMissing, Storage, StorageUnavailable
from models.bundle import Bundle, fetch, read_alias
from models.deltas import DeltaReader, Moved
from models.serving.cache import prune
from models.serving.recommender import Recommender
from models.serving.telemetry import Telemetry

POLL_S = 1.0
MAX_RETRY_S = 300.0

log = logging.getLogger(__name__)


class Follower:
    """Keeps ``recommender`` at the bundle that ``alias`` names; ``check`` does one step, ``start`` polls.

    ``threads`` are those that run the model in service: a new one proves itself and warms up there, between batches.
    """

    def __init__(
        self,
        name: str,
        alias: str,
        storage: Storage,
        cache: Path,
        *,
        device: str = "cpu",
        bf16: bool = False,
        cuda_graphs: bool = False,
        warm_up: Sequence[int] = (),
        threads: Executor | None = None,
        keep: int = 2,
    ) -> None:
        self.name = name
        self.alias = alias
        self.telemetry = Telemetry(name)
        self.recommender: Recommender | None = None
        self.loading = False
        self.reason = "it has not looked for its bundle yet"
        self._storage = storage
        self._cache = cache
        self._device = device
        self._options = {"bf16": bf16, "cuda_graphs": cuda_graphs}
        self._warm_up = warm_up
        self._threads = threads
        self._keep = keep
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._deltas = DeltaReader(storage)
        self._published: Bundle | None = None
        self._moved: Moved | None = None
        self._refused: dict[str, tuple[float, float]] = {}  # version -> (no retry before, wait after the next refusal)

    @property
    def version(self) -> str | None:
        """The version in service."""
        return self.recommender.bundle.version if self.recommender else None

    def about(self) -> dict[str, Any]:
        """For the status page."""
        ready = self.recommender is not None
        about = {"alias": self.alias, "version": self.version, "ready": ready, "reason": self.reason}
        return {**about, **self.catalogue()}

    def catalogue(self) -> dict[str, int]:
        """For the status page: ``items``, how many are ``appended`` or ``blocked``, and how many ``deltas`` say so."""
        moved = self._moved
        if moved is None:
            return {"items": 0, "appended": 0, "blocked": 0, "deltas": 0}
        count = len(moved.bundle.catalogue)
        return {"items": count, "appended": moved.appended, "blocked": moved.blocked, "deltas": len(moved.keys)}

    def start(self) -> None:
        """Polls from a daemon thread until ``stop``."""
        threading.Thread(target=self._poll, name=f"follow-{self.name}", daemon=True).start()

    def stop(self) -> None:
        """Ends the polling."""
        self._stopped.set()

    def check(self, retry_refused: bool = False) -> None:
        """Looks at the alias once and swaps when it moved; ``reason`` says why not when it did not work out."""
        with self._lock:
            try:
                version = self._named()
                if version is None:
                    self._explain(f"alias {self.alias!r} does not exist yet; publish a bundle and point it there")
                elif version != self.version and (retry_refused or self._may_try(version)):
                    self._load(version)
                elif version == self.version:
                    self._follow_deltas(version)
            except (StorageUnavailable, ObjectMissing, OSError, ValueError) as error:
                self._explain(str(error.args[0] if error.args else error))

    def _named(self) -> str | None:
        """The version that the alias names; raises ValueError when what is stored there is no alias."""
        try:
            return read_alias(self._storage, self.alias)
        except ObjectMissing:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"alias {self.alias!r} cannot be read ({type(error).__name__}: {error}); "
                "set it again (`onerec promote`, or see ONEREC_S3_ENDPOINT and ONEREC_BUCKET)"
            ) from error

    def _poll(self) -> None:
        while not self._stopped.is_set():
            try:
                self.check()
            except Exception:  # the thread must outlive any single bundle
                log.exception("model %s: following alias %s failed", self.name, self.alias)
            self._stopped.wait(POLL_S)

    def _load(self, version: str) -> None:
        began = time.monotonic()
        self.loading = True
        try:
            bundle = Bundle.load(fetch(self._storage, version, self._cache), self._device)
            # With its deltas from the first request on: what is taken down must not show even once.
            moved = self._deltas.apply(bundle, self._deltas.keys(version))
            recommender = Recommender(moved.bundle, **self._options)
            self._beside_batches(recommender.prove)
            for length in self._warm_up:
                self._beside_batches(lambda length=length: recommender.warm_up(length))  # type: ignore[misc]
        except (StorageUnavailable, ObjectMissing, OSError):
            raise
        except Exception as error:  # whatever it is about this bundle: it is not tried again every second
            self._refuse(version, error)
            return
        finally:
            self.loading = False
        old = self.version
        self._published = bundle
        self._swap(moved, recommender)
        self._refused.pop(version, None)
        self.telemetry.serving(version, old)
        log.info("model %s serves %s (before: %s), loaded in %.1f s", self.name, version, old, time.monotonic() - began)
        prune(self._cache, self.name, version, self._keep)

    def _beside_batches(self, run: Callable[[], None]) -> None:
        """One run of a model that does not serve yet, in turn with those that do: side by side both would crawl."""
        if self._threads is None:
            run()
        else:
            self._threads.submit(run).result()

    def _follow_deltas(self, version: str) -> None:
        """Applies what storage lists for the version in service, when that changed."""
        published, before, keys = self._published, self._moved, self._deltas.keys(version)
        if published is None or before is None:
            return
        if keys != before.keys:
            moved = self._deltas.apply(published, keys)
            self._swap(moved, Recommender(moved.bundle, **self._options))
            self.telemetry.moved()
            log.info(
                "model %s: %s with %d deltas, %d items appended, %d blocked",
                *(self.name, version, len(keys), moved.appended, moved.blocked),
            )
        elif not before.problems:
            self.reason = ""

    def _swap(self, moved: Moved, recommender: Recommender) -> None:
        self.recommender, self._moved, self.reason = recommender, moved, ""
        if moved.problems:
            self._explain("; ".join(moved.problems))
        self.telemetry.catalogue(self.catalogue(), len(moved.problems))

    def _refuse(self, version: str, error: Exception) -> None:
        wait = self._refused.get(version, (0.0, 10.0))[1]
        self._refused[version] = (time.monotonic() + wait, min(2 * wait, MAX_RETRY_S))
        self.telemetry.refused(version)
        kept = f"; {self.version} stays in service" if self.version else ""
        self._explain(f"refused {version}: {error}{kept}")

    def _may_try(self, version: str) -> bool:
        return time.monotonic() >= self._refused.get(version, (0.0, 0.0))[0]

    def _explain(self, reason: str) -> None:
        if reason != self.reason:
            log.warning("model %s: %s", self.name, reason)
        self.reason = reason
