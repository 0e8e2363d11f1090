"""Trains the QFormer: item-to-item contrast and the caption loss (V1, arXiv 2506.13695, 2.1.1).

Each step draws U2I and I2I pairs of one fold and descends ``w_u2i InfoNCE(U2I) + w_i2i InfoNCE(I2I) + w_caption
NTP(caption)``. Which pairs, which masks: everything random is a function of (seed, step), so a killed run that goes on
from its checkpoint ends where an uninterrupted one does. Left out: several machines, as a catalogue's QFormer fits one.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from models.tokenizer.caption import CaptionDecoder
from models.tokenizer.checkpoint import CHECKPOINT, restore, save
from models.tokenizer.contrast import info_nce, same_items
from models.tokenizer.modalities import NAMES, Modality, Tokens
from models.tokenizer.qformer import Inputs, QFormer, QFormerShape

Report = Callable[[Mapping[str, float]], None]
"""Called every few steps with ``step``, ``steps``, ``loss``, its parts and ``pairs_per_s``."""

_CAPTIONS = 64  # ours: captions decoded a step
_WARMUP = 20
_REPORT_EVERY = 20


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """What the embedding is made of and how it is trained; sizes and weights are ours, the paper gives few.

    Every modality, and every loss by weight 0, can be switched off.
    """

    modalities: tuple[str, ...] = NAMES
    text: Literal["ngrams", "sentence"] = "ngrams"
    """``sentence`` needs the optional extra ``text``."""
    dim: int = 64
    width: int = 64
    queries: int = 4
    layers: int = 4
    heads: int = 4
    u2i: float = 1.0
    i2i: float = 1.0
    caption: float = 0.5
    temperature: float = 0.07
    spread: float = 0.5
    """How far the vectors are spread over little used directions before they are quantised: 0 not at all, 1 wholly."""
    detail: float = 0.4
    """How much of its title's own words an item's vector gets, so that variants of one product differ (``detail``)."""
    hide: float = 0.2
    """Chance that a step does not show an item's collaborative token: content alone must place a new item."""
    folds: int = 4
    """Parts of the users; the pairs of each are learned with collaborative vectors of the others. 1 = no such care."""
    epochs: float = 1.0
    """Passes over the U2I pairs (I2I pairs when there are none)."""
    max_steps: int = 2000
    batch: int = 128
    """Pairs of each kind a step."""
    learning_rate: float = 3e-3
    threads: int = 1
    """CPU threads; equal results need equal threads."""
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "modalities", tuple(self.modalities))  # JSON knows only lists
        unknown = sorted(set(self.modalities) - set(NAMES))
        if unknown or not self.modalities:
            raise ValueError(f"modalities {self.modalities} name {unknown or 'none'}; choose among {', '.join(NAMES)}")
        if self.text not in ("ngrams", "sentence"):
            raise ValueError(f"text is {self.text!r}; expected 'ngrams' or 'sentence'")
        least = {"dim": 4, "width": 4, "queries": 1, "layers": 1, "heads": 1, "folds": 1, "batch": 2, "threads": 1}
        low = {name: getattr(self, name) for name, limit in least.items() if getattr(self, name) < limit}
        if low or self.width % self.heads:
            raise ValueError(
                f"got {low or f'width {self.width}, heads {self.heads}'}; expected at least {least}, and "
                "a width that the heads divide"
            )
        if min(self.u2i, self.i2i, self.caption) < 0 or self.temperature <= 0 or not 0 <= self.hide < 1:
            raise ValueError("loss weights must not be negative, temperature above 0 and hide in [0, 1)")
        if not 0 <= self.detail <= 1:
            raise ValueError(f"detail is {self.detail}; it must lie in [0, 1]")
        if not 0 <= self.spread <= 1:
            raise ValueError(f"spread is {self.spread}; it must lie in [0, 1]")
        if not self.u2i + self.i2i:
            raise ValueError("u2i and i2i are both 0: captions alone do not train the embedding; keep one of them")


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """What one fold teaches: pairs [m, 2] of rows by loss, some for a loss switched on; the collaborative token."""

    pairs: Mapping[str, np.ndarray]
    watched: Tokens | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Course:
    """All that is learned from: the items' tokens, the lessons, and captions int64 [n, words] of numbered words."""

    tokens: Mapping[str, Tokens]
    shape: QFormerShape
    lessons: Sequence[Lesson]
    captions: np.ndarray
    vocabulary: int


class Aligner:
    """A QFormer under training, with the caption decoder that is trained along."""

    def __init__(self, course: Course, config: AlignmentConfig) -> None:
        self.course, self.config = course, config
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.model = QFormer(course.shape)
            self.decoder = CaptionDecoder(course.vocabulary, config.width, config.heads)
        self.network = nn.ModuleDict({"qformer": self.model, "decoder": self.decoder})
        self.inputs = to_inputs(course.tokens)
        self.watched = [to_inputs({"": lesson.watched})[""] if lesson.watched else None for lesson in course.lessons]
        self.captions = torch.from_numpy(course.captions)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True
        )

    @property
    def steps(self) -> int:
        """How many steps the configuration asks for; 0 when there is nothing to learn from."""
        sizes = [sum(len(lesson.pairs[kind]) for lesson in self.course.lessons) for kind in ("u2i", "i2i")]
        weights = (self.config.u2i, self.config.i2i)
        pairs = next((size for size, weight in zip(sizes, weights, strict=True) if size and weight), 0)
        return min(math.ceil(self.config.epochs * pairs / self.config.batch), self.config.max_steps)

    def step(self, number: int) -> dict[str, float]:
        """One update; returns the losses."""
        loss, parts = self._loss(number)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * _rate(number, self.steps)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        return {"loss": float(loss.detach()), **parts}

    def _loss(self, number: int) -> tuple[Tensor, dict[str, float]]:
        config = self.config
        rng = np.random.default_rng((config.seed, number))
        fold = number % len(self.course.lessons)
        drawn = {
            kind: pairs[rng.integers(0, len(pairs), config.batch)]
            for kind, pairs in self.course.lessons[fold].pairs.items()
            if len(pairs) and getattr(config, kind)
        }
        rows, inverse = np.unique(np.concatenate(list(drawn.values())), return_inverse=True)
        places = torch.from_numpy(inverse.reshape(-1, 2)).split(config.batch)
        latent, vectors = self.model(self._shown(rows, fold, rng))
        loss, parts = latent.sum() * 0, {}
        for (kind, _), place in zip(drawn.items(), places, strict=True):
            left, right = place.unbind(1)
            part = info_nce(vectors[left], vectors[right], same_items(left, right), config.temperature)
            loss = loss + getattr(config, kind) * part
            parts[kind] = float(part.detach())
        if config.caption:
            some = rng.permutation(len(rows))[:_CAPTIONS]
            part = self.decoder(latent[some], self.captions[rows[some]])
            loss = loss + config.caption * part
            parts["caption"] = float(part.detach())
        return loss, parts

    def _shown(self, rows: np.ndarray, fold: int, rng: np.random.Generator) -> Inputs:
        """The tokens of ``rows``: the fold's collaborative vectors instead of the whole log's, hidden now and then."""
        chosen = torch.from_numpy(rows)
        shown = take(self.inputs, chosen)
        watched = self.watched[fold]
        if watched is not None:
            values, mask = watched[0][chosen], watched[1][chosen]
            seen = torch.from_numpy(rng.random(len(rows)) >= self.config.hide)
            shown["collaborative"] = values, mask & seen[:, None]
        return shown


def align(course: Course, config: AlignmentConfig, keep: Path | None = None, report: Report | None = None) -> QFormer:
    """The trained QFormer, in evaluation mode.

    With ``keep``, a folder, a checkpoint is written there and an interrupted training goes on from it; raises
    ValueError when it holds another training's. Raises FloatingPointError when the loss is not finite.
    """
    with torch_threads(config.threads):
        aligner = Aligner(course, config)
        path = keep / CHECKPOINT if keep is not None else None
        mark = fingerprint(course, config) if path is not None else ""
        start = restore(path, aligner.network, aligner.optimizer, mark) if path is not None and path.exists() else 0
        began, since = time.perf_counter(), start
        for number in range(start, aligner.steps):
            losses = aligner.step(number)
            if not math.isfinite(losses["loss"]):
                raise FloatingPointError(f"the loss is {losses['loss']} at step {number}; lower learning_rate")
            done = number + 1
            if report is not None and (done % _REPORT_EVERY == 0 or done == aligner.steps):
                rate = (done - since) * config.batch / max(time.perf_counter() - began, 1e-9)
                report({"step": done, "steps": aligner.steps, **losses, "pairs_per_s": rate})
                began, since = time.perf_counter(), done
            if path is not None and (done % config.checkpoint_every == 0 or done == aligner.steps):
                save(path, aligner.network, aligner.optimizer, done, mark)
    return aligner.model.eval()


def shape_of(modalities: Mapping[str, Modality], config: AlignmentConfig) -> QFormerShape:
    """The QFormer's sizes for these modalities."""
    return QFormerShape(
        features={name: modality.width for name, modality in modalities.items() if not modality.buckets},
        buckets={name: modality.buckets for name, modality in modalities.items() if modality.buckets},
        dim=config.dim,
        width=config.width,
        queries=config.queries,
        layers=config.layers,
        heads=config.heads,
    )


def to_inputs(tokens: Mapping[str, Tokens]) -> dict[str, tuple[Tensor, Tensor]]:
    """Tokens as tensors."""
    return {name: (torch.from_numpy(part.values), torch.from_numpy(part.mask)) for name, part in tokens.items()}


def take(inputs: Inputs, rows: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The tokens of some rows."""
    return {name: (values[rows], mask[rows]) for name, (values, mask) in inputs.items()}


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Computes with ``threads`` CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fingerprint(course: Course, config: AlignmentConfig) -> str:
    """Names everything that decides the outcome; equal fingerprints may resume each other."""
    digest = hashlib.sha256(json.dumps(asdict(replace(config, checkpoint_every=1)), sort_keys=True).encode())
    arrays = [course.captions]
    for part in (*course.tokens.values(), *(lesson.watched for lesson in course.lessons if lesson.watched)):
        arrays += [part.values, part.mask]
    arrays += [pairs for lesson in course.lessons for pairs in lesson.pairs.values()]
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _rate(number: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up, then half a cosine down to 5 %."""
    warm = min((number + 1) / min(_WARMUP, max(steps // 5, 1)), 1.0)
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * number / max(steps, 1))))
