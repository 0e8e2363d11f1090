"""What 18 billion samples a day, 8 B parameters and 400 000 requests a second would take: arithmetic, nothing is run.

Work follows from the model's size: training 6 FLOPs a parameter and token, three tokens a sample (OneRec-V2, arXiv
2508.20900, counts so); beam search 2 a parameter for the first token and for every beam of the two others, and the
heads. ``errors`` holds these formulas against torch's counter (``benchmarks.flops``, ``benchmarks.decoding``). How fast
the work is done is measured on a CPU here and **assumed** on a GPU: the share of the peak is an option, its default
what our own CPU runs reached. The rest of the platform is divided by measured rates of one process (``Rates``,
benchmarks/README.md). Left out: roll-outs for alignment, evaluation, network, the context's own encoding, spare pods.
"""

import math
from dataclasses import asdict, dataclass

import typer

from benchmarks.flops import CODES, on_meta, parameters
from benchmarks.harness import finish, table
from models.sizes import preset

TOKENS = 3
DAY = 86_400
COUNTED_TRAINING = {"v2-0.5b": 9.80e9, "v2-1b": 19.82e9, "v2-8b": 144.27e9}
"""FLOPs of a sample as ``benchmarks.flops`` counts them ("counted as the paper does")."""
COUNTED_SERVING = {32: 2.8895e9, 128: 11.158e9, 512: 44.232e9}
"""FLOPs of a request by beam: preset ``small``, context 512, as ``benchmarks.decoding`` counts them."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one process did here: benchmarks intake, etl, lifelong and tokenizer."""

    events: float = 224_000
    """Events a second and collector, on a busy machine (1 097 000 on a quiet one; one uploader carries 558 000)."""
    etl_rows: float = 346_000
    """Exposures a second to sequences, Ray Data on two cores."""
    lifelong_users: float = 4_069
    """Users of 2 000 views a minute and thread, all anew."""
    row_bytes: float = 56
    """An exposure with SIDs and log-probabilities in Parquet (KuaiRand-Pure)."""
    window_bytes: float = 75_000
    """A user with every pathway full, as Feast stores it: estimated from its encoding, 33 bytes an event."""


RATES = Rates()


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked for; requests are the busiest second's, ``peak`` is that second's samples over the mean's."""

    samples_a_day: float = 18e9
    requests_a_second: float = 400_000
    users: float = 400e6
    beam: int = 512
    items: int = 10
    peak: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU: its bf16 peak, the shares of it that are reached, its price."""

    peak: float = 989.4e12
    training_share: float = 0.42
    """Our training step on a CPU with five targets a request; the published V2 is not told."""
    serving_share: float = 0.44
    """Our beam search on a CPU in batches of 8 at beam 128; the published one reaches 0.62."""
    price: float = 2.5


def training_flops(body: float) -> float:
    """FLOPs of one sample, forward and backward, of a model with ``body`` parameters in its layers."""
    return 6 * body * TOKENS


def serving_flops(body: float, width: int, beam: int, codes: int = CODES) -> float:
    """FLOPs of one request: the first token once, each beam of the others, and their heads."""
    return 2 * (body + codes * width) * (1 + (TOKENS - 1) * beam)


def _sizes(name: str, codes: int = CODES) -> tuple[int, int]:
    """Parameters a token uses in the layers, and the width."""
    config = preset(name, codes)
    return parameters(on_meta(config))["active"], config.d_model


def errors() -> dict[str, float]:
    """The formulas over the counts, minus one."""
    found = {
        f"training {name}": training_flops(_sizes(name)[0]) / flops - 1 for name, flops in COUNTED_TRAINING.items()
    }
    body, width = _sizes("small")
    return found | {f"beam {b}": serving_flops(body, width, b) / f - 1 for b, f in COUNTED_SERVING.items()}


def cost(name: str, load: Load, gpu: Gpu) -> dict[str, float]:
    """GPUs, and their price a day, of one size."""
    body, width = _sizes(name)
    training = load.samples_a_day / DAY * training_flops(body) / (gpu.peak * gpu.training_share)
    request = serving_flops(body, width, load.beam)
    serving = load.requests_a_second * request / (gpu.peak * gpu.serving_share)
    return {
        "tflop_per_request": request / 1e12,
        "ms_per_request": 1000 * request / (gpu.peak * gpu.serving_share),
        "training_gpus": math.ceil(training),
        "serving_gpus": math.ceil(serving),
        "usd_a_day": 24 * gpu.price * (math.ceil(training) + math.ceil(serving)),
    }


def platform(load: Load, rates: Rates = RATES) -> dict[str, float]:
    """What everything but the model needs: processes, threads, bytes."""
    # An impression and its feedback a sample, and a served event for each item of every answer.
    events = 2 * load.samples_a_day / DAY * load.peak + load.requests_a_second * load.items
    return {
        "events_a_second_at_peak": events,
        "collectors": math.ceil(events / rates.events),
        "etl_machines": math.ceil(load.samples_a_day / DAY / rates.etl_rows * 24 / 4),
        "lifelong_threads": math.ceil(load.users / (rates.lifelong_users * 60 * 24)),
        "exposure_terabytes_a_day": load.samples_a_day * rates.row_bytes / 1e12,
        "online_terabytes": load.users * rates.window_bytes / 1e12,
    }


def main(
    quick: bool = False,
    beam: int = Load.beam,
    requests: float = Load.requests_a_second,
    training_share: float = Gpu.training_share,
    serving_share: float = Gpu.serving_share,
    peak_tflops: float = Gpu.peak / 1e12,
    price: float = Gpu.price,
) -> None:
    """Prints the model's parts and, as the last line, all of it as JSON; ``--quick`` changes nothing."""
    gpu = Gpu(peak=peak_tflops * 1e12, training_share=training_share, serving_share=serving_share, price=price)
    load = Load(requests_a_second=requests, beam=beam)
    found = {name: cost(name, load, gpu) for name in ("v2-1b", "v2-moe-4b", "v2-8b")}
    wrong, rest = errors(), platform(load)
    table("Formula over torch's count", ("", "error"), [(name, f"{error:+.1%}") for name, error in wrong.items()])
    rows = [(name, *(f"{value:,.4g}" for value in row.values())) for name, row in found.items()]
    table(f"{load.requests_a_second:,.0f} requests a second at beam {beam}", ("size", *found["v2-8b"]), rows)
    table("Around the model", ("", ""), [(name, f"{value:,.4g}") for name, value in rest.items()])
    finish(
        {"quick": quick, "load": asdict(load), "gpu": asdict(gpu), "errors": wrong, "sizes": found, "platform": rest}
    )


if __name__ == "__main__":
    typer.run(main)
