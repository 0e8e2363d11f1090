"""What an optimizer step costs: the lazy decoder against the encoder-decoder, and how much of the machine it uses.

``python -m benchmarks.training [--quick]``. OneRec-V2 (arXiv 2508.20900) 2.1: an encoder spends nearly all its compute
on the context, and the lazy decoder trains on a tenth of the resources.

Step against step: V2 (6 layers of d 384) and V1 (3 encoder and 3 decoder layers of d 384, FFN 4d) have 108 d^2 = 16 M
parameters in their layers; both read the same 512 context tokens without padding, five targets a request, in bf16.
Model FLOPs utilisation: 6 x parameters of the layers x target tokens / step time, over the best square bf16 product of
the same run. The paper's counting takes three tokens a target; ours computes BOS once a request, so ``executed`` beside
it counts the products really made, the context's included. Left out: data loading (a thread does it meanwhile).
"""

import sys
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import alternate, finish, matmul_peak, table
from features.schema import FLAGS
from models.architectures import model_of
from models.generator import GeneratorConfig
from models.objectives.ntp import ntp_loss
from models.onerec_v1 import V1Config
from models.onerec_v2 import V2Config
from models.pathways import NUMERIC, PATHWAYS, ContextTensors
from models.sizes import preset
from models.training.config import FitConfig
from models.training.device import autocast, prepare_device
from models.training.optimizer import active_parameters, adamw
from models.training.parallel import scaled_norm

CODES = 256
LENGTHS = {512: (20, 256, 235), 149: (20, 64, 64)}
"""Behaviours of the short, positive and lifelong pathways that make so many context tokens with the static one."""
PLAIN = FitConfig(precision="bf16")


@dataclass(frozen=True)
class Batch:
    """One step's input: requests without padding."""

    context: ContextTensors
    targets: Tensor

    @classmethod
    def random(cls, config: GeneratorConfig, requests: int, targets: int, tokens: int) -> "Batch":
        """``requests`` of ``targets`` each, all with ``tokens`` context tokens (one of ``LENGTHS``)."""
        generator = torch.Generator().manual_seed(0)
        lengths = LENGTHS[tokens]
        slots = (requests, sum(lengths))

        def codes(high: int, *shape: int) -> Tensor:
            return torch.randint(0, high, shape, generator=generator)

        context = ContextTensors(
            static=codes(config.static_buckets, requests, config.static_fields),
            sids=codes(config.codes, *slots, config.levels) + 1,
            author=codes(config.author_buckets, *slots),
            tag=codes(config.tag_buckets, *slots),
            numeric=torch.randn(*slots, len(NUMERIC), generator=generator),
            labels=codes(2, *slots, len(FLAGS)).float(),
            kind=torch.repeat_interleave(torch.arange(len(PATHWAYS)), torch.tensor(lengths)),
            mask=torch.ones(slots, dtype=torch.bool),
        )
        return cls(context, codes(config.codes, requests, targets, config.levels))


class Trainer:
    """A model with its optimizer; calling it makes one step, as ``models.training.loop`` does."""

    def __init__(self, config: GeneratorConfig, batch: Batch, fit: FitConfig = PLAIN) -> None:
        torch.manual_seed(0)
        self.model, self.batch, self.fit = model_of(config), batch, fit
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)
        self.batch = Batch(batch.context.to(self.device), batch.targets.to(self.device))
        self.optimizer = adamw(self.model, fit)
        self.weights = torch.ones(self.batch.targets.shape[:2], device=self.device)

    @property
    def tokens(self) -> int:
        """Target tokens of a step, three for a target."""
        return self.batch.targets.numel()

    def loss(self) -> Tensor:
        with autocast(self.fit.precision, self.device):
            logits = self.model(self.batch.context, self.batch.targets)
            return ntp_loss(logits, self.batch.targets, self.weights, self.model.level_loss)

    def __call__(self) -> float:
        loss = self.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        scaled_norm(self.model, 1.0, self.fit.clip_norm)
        self.optimizer.step()
        return float(loss.detach())

    def flops(self) -> float:
        """Products made by one forward and backward pass."""
        counter = FlopCounterMode(display=False)
        with counter:
            self.loss().backward()
        return float(counter.get_total_flops())

    def saved_bytes(self) -> int:
        """Bytes kept for the backward pass, each storage once, without the weights."""
        kept = {p.untyped_storage().data_ptr(): 0 for p in self.model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.loss()
        del loss
        return sum(kept.values())


def rivals(requests: int) -> dict[str, Trainer]:
    """V2 and V1 of equal layer parameters on the same batch."""
    shared: dict[str, Any] = {"codes": CODES, "d_model": 384, "heads": 6, "embed": 64, "head": "tied"}
    v2 = V2Config(layers=6, kv_groups=2, processor="direct", **shared)
    v1 = V1Config(
        encoder_layers=3,
        decoder_layers=3,
        ffn=4 * 384,
        kv_groups=6,
        queries=0,
        static_width=32,
        author_width=64,
        field_width=32,
        recency_bias=True,
        **shared,
    )
    batch = Batch.random(v2, requests, 5, 512)
    return {"V2": Trainer(v2, batch), "V1": Trainer(v1, batch)}


def layer_parameters(trainer: Trainer) -> int:
    """Parameters of encoder and decoder layers, with V1's projections to keys and values."""
    context = trainer.model.context
    parts = [trainer.model.blocks, getattr(context, "blocks", None), getattr(context, "project", None)]
    return sum(p.numel() for part in parts if part is not None for p in part.parameters())


def step_ratio(requests: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step of each, interleaved."""
    pair = rivals(requests)
    for trainer in pair.values():
        trainer()
    seconds = alternate(list(pair.values()), repeats)
    ratios = seconds[:, 1] / seconds[:, 0]
    rows = {
        name: {
            "layer_parameters": layer_parameters(trainer),
            "step_ms": float(np.median(seconds[:, index])) * 1e3,
            "gflops_executed": trainer.flops() / 1e9,
            "saved_mb": trainer.saved_bytes() / 1e6,
        }
        for index, (name, trainer) in enumerate(pair.items())
    }
    return {
        "encdec_over_lazy_step_ratio": float(np.median(ratios)),
        "step_ratio_low": float(ratios.min()),
        "step_ratio_high": float(ratios.max()),
        "encdec_over_lazy_flops": rows["V1"]["gflops_executed"] / rows["V2"]["gflops_executed"],
        "rivals": rows,
        "requests": requests,
    }


class Peak:
    """The best square bf16 product of the run; it takes turns with the steps, so that both see the machine alike."""

    def __init__(self) -> None:
        self.flops = matmul_peak()

    def __call__(self) -> None:
        self.flops = max(self.flops, matmul_peak(repeats=2))


def utilisation(trainer: Trainer, repeats: int, peak: Peak) -> dict[str, Any]:
    """What a step takes; ``shared`` adds the utilisation once the run's peak is known."""
    trainer()
    seconds = float(np.median(alternate([trainer, peak], repeats)[:, 0]))
    return {
        "step_ms": seconds * 1e3,
        "exposures_per_s": trainer.tokens / trainer.model.config.levels / seconds,
        "layer_parameters": active_parameters(trainer.model),
        "target_tokens": trainer.tokens,
        "gflops_executed": trainer.flops() / 1e9,
        "saved_mb": trainer.saved_bytes() / 1e6,
        "shares": breakdown(trainer),
    }


def shared(row: dict[str, Any], peak: Peak) -> dict[str, Any]:
    """The row with MFU and the share of the peak that its products reach over the whole step."""
    per_peak = 1 / (row["step_ms"] / 1e3 * peak.flops)
    model = 6 * row["layer_parameters"] * row["target_tokens"]
    return {**row, "mfu": model * per_peak, "executed_share": row["gflops_executed"] * 1e9 * per_peak}


def breakdown(trainer: Trainer) -> dict[str, float]:
    """Shares of one step's time by kind of operation, from torch's profiler."""
    kinds = {"products": ("mm", "bmm", "addmm", "baddbmm"), "optimizer": ("_fused_adamw_", "_foreach_mul_")}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trainer()
    times = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in profile.key_averages()}
    total = sum(times.values())
    shares = {kind: sum(times.get(name, 0.0) for name in names) / total for kind, names in kinds.items()}
    return {**shares, "rest": 1 - sum(shares.values())}


def shapes(quick: bool) -> dict[str, tuple[str, int, int, int]]:
    """Name: preset, requests, targets, context tokens."""
    every = {
        "small": ("small", 64, 10, 512),
        "small, 5 targets": ("small", 64, 5, 512),
        "small, our pathways": ("small", 64, 10, 149),
        "tiny, our pathways": ("tiny", 64, 10, 149),
    }
    return {name: every[name] for name in ("small", "tiny, our pathways")} if quick else every


def main(
    quick: Annotated[bool, typer.Option(help="fewer shapes and repeats")] = False,
    requests: Annotated[int, typer.Option(help="requests of a step of V1 and V2")] = 32,
    repeats: Annotated[int, typer.Option(help="timed steps of each")] = 9,
) -> None:
    """Compares the steps, then measures utilisation."""
    repeats = 3 if quick else repeats
    prepare_device(torch.get_num_threads())
    record: dict[str, Any] = step_ratio(requests, repeats)
    _show_rivals(record)
    found, peak = {}, Peak()
    for name, (size, batch, targets, tokens) in shapes(quick).items():
        config = replace(preset(size, CODES if size == "small" else 64), dropout=0.0)
        trainer = Trainer(config, Batch.random(config, batch, targets, tokens))
        row = utilisation(trainer, repeats, peak)
        found[name] = row | {"requests": batch, "targets": targets, "context": tokens}
        print(f"{name}: {row['step_ms']:.0f} ms, peak {peak.flops / 1e9:.0f} GFLOP/s", file=sys.stderr)
    found = {name: shared(row, peak) for name, row in found.items()}
    _show_utilisation(found)
    record |= {
        "mfu_training": found["small"]["mfu"],
        "mfu_rows": found,
        "peak_gflops": peak.flops / 1e9,
        "threads": torch.get_num_threads(),
        "quick": quick,
    }
    finish(record)


def _show_rivals(record: dict[str, Any]) -> None:
    title = f"{record['requests']} requests, 512 context tokens, 5 targets each; bf16, AdamW; V1 / V2 step time "
    columns = ("", "parameters in layers", "step, ms", "GFLOP made", "saved for backward, MB")
    rows = [(name, *row.values()) for name, row in record["rivals"].items()]
    table(f"{title}{record['encdec_over_lazy_step_ratio']:.2f}", columns, rows)


def _show_utilisation(found: dict[str, dict[str, Any]]) -> None:
    columns = ("preset", "requests x targets", "context", "step, ms", "exposures/s", "MFU", "executed / peak")
    rows = [
        (
            name,
            f"{row['requests']} x {row['targets']}",
            row["context"],
            row["step_ms"],
            row["exposures_per_s"],
            row["mfu"],
            row["executed_share"],
            *row["shares"].values(),
        )
        for name, row in found.items()
    ]
    table("model FLOPs utilisation in bf16", (*columns, "in products", "in optimizer", "elsewhere"), rows)


if __name__ == "__main__":
    typer.run(main)
