"""A roll-out server's weights: a bundle to begin with, then whatever the trainer pushes, in memory only.

OneRec samples its reinforcement learning's roll-outs from the inference service, to which the trainer pushes its
weights (technical report, arXiv 2506.13695, 3.3). Here that is a server of its own (``--role rollout``): it starts from
a version and never follows an alias, so unblessed weights never meet users. A push is a safetensors file of the same
architecture, verified by its sha256, loaded beside the running weights and swapped; tokenizer, catalogue and trie stay
the bundle's. Every answer names the version string the trainer gave and the number of the push, so that the trainer
knows how stale a sample is. Left out: partial pushes, several shards.
"""

import hashlib
import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from kserve.errors import InvalidInput
from safetensors import SafetensorError
from safetensors.torch import load_file

from features.storage import Storage
from models.architectures import restored
from models.bundle import Bundle, fetch
from models.generator import Generator
from models.serving.recommender import Recommender
from models.serving.telemetry import Telemetry

log = logging.getLogger(__name__)


class Pinned:
    """The weights of one version of a bundle until others are pushed."""

    def __init__(
        self, name: str, version: str, storage: Storage, cache: Path, *, device: str = "cpu", bf16: bool = False
    ) -> None:
        self.name = name
        self.telemetry = Telemetry(name)
        self.recommender: Recommender | None = None
        self.loading = False
        self.reason = f"bundle {version} is being loaded"
        self._version = version
        self._storage = storage
        self._cache = cache
        self._device = device
        self._bf16 = bf16
        self._lock = threading.Lock()

    def about(self) -> dict[str, Any]:
        """For the status page."""
        serving = self.recommender
        return {
            "alias": "",
            "bundle": self._version,
            "version": serving.bundle.version if serving else None,
            "push": serving.push if serving else None,
            "ready": serving is not None,
            "reason": self.reason,
        }

    def check(self, retry_refused: bool = False) -> None:
        """Refused: a roll-out server has no alias to look at."""
        raise InvalidInput(f"model {self.name} is a roll-out server's: it follows no alias; push weights instead")

    def start(self) -> None:
        """Loads the bundle; raises ObjectMissing, BundleCorrupt or StorageUnavailable."""
        bundle = Bundle.load(fetch(self._storage, self._version, self._cache), self._device)
        self._serve(Recommender(bundle, bf16=self._bf16, push=0))

    def stop(self) -> None:
        """Nothing runs in the background."""

    @property
    def limit(self) -> int:
        """The most bytes that a push can have: all weights in fp32, keys in their own type, and the file's header."""
        assert self.recommender is not None
        state = self.recommender.bundle.model.state_dict()
        return (
            sum(max(4, tensor.element_size()) * tensor.numel() for tensor in state.values()) + 1024 * len(state) + 2**20
        )

    def push(self, path: Path, sha256: str, version: str) -> int:
        """Serves the weights of the file under the name ``version``; returns the push's number.

        Raises InvalidInput when the file is not what ``sha256`` says, or not weights of this architecture.
        """
        with self._lock:
            serving = self.recommender
            if serving is None:
                raise InvalidInput(f"model {self.name} has no weights yet: {self.reason}")
            with path.open("rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
            if actual != sha256:
                raise InvalidInput(f"the weights have sha256 {actual}, expected {sha256!r}; push them again")
            bundle = replace(serving.bundle, model=self._model(path, serving.bundle.model), version=version)
            number = (serving.push or 0) + 1
            try:
                self._serve(Recommender(bundle, bf16=self._bf16, push=number))
            except ValueError as error:
                raise InvalidInput(f"the weights of {version!r} are not servable: {error}") from error
            return number

    def _model(self, path: Path, like: Generator) -> Generator:
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise InvalidInput(f"the weights are not a safetensors file ({error})") from error
        expected = {name: tuple(tensor.shape) for name, tensor in like.state_dict().items()}
        given = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if wrong := sorted(name for name in {**expected, **given} if expected.get(name) != given.get(name)):
            first = wrong[0]
            raise InvalidInput(
                f"{len(wrong)} tensors are not of this architecture, first {first!r}: shape {given.get(first)}, "
                f"expected {expected.get(first)}; push the state_dict of the model that bundle {self._version} holds"
            )
        # Weights alone become fp32: the keys of a memory are whole numbers, which fp32 would round.
        weights = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        model = restored(like.config, weights)
        return model.to(self._device).eval().requires_grad_(False)

    def _serve(self, recommender: Recommender) -> None:
        recommender.prove()
        before = self.recommender.bundle.version if self.recommender else None
        self.recommender, self.reason = recommender, ""
        version = recommender.bundle.version
        log.info("model %s serves %s (push %s, before: %s)", self.name, version, recommender.push, before)
