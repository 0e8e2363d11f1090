"""What a training left in a folder, in memory and ready to recommend from: benchmarks publish nothing.

Left out: reward models and take-downs, which a published bundle may have (``models.bundle``).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from features.histories.windows import Limits
from models.architectures import restored
from models.bundle import UNPUBLISHED, Bundle
from models.decoding.trie import Trie
from models.generator import Generator, GeneratorConfig
from models.tokenizer.tokenizer import Tokenizer
from models.tokenizer.vocabulary import Catalogue


def model_in(folder: Path, size: GeneratorConfig) -> Generator:
    """The model of ``size`` with the weights of ``folder``, set to evaluate."""
    return restored(size, load_file(folder / "model.safetensors")).eval()


def unpublished(
    model: Generator, tokenizer: Tokenizer, catalogue: Catalogue, metrics: Mapping[str, Any] | None = None
) -> Bundle:
    """A bundle around ``model`` that was never stored."""
    return Bundle(
        version=UNPUBLISHED,
        model=model.eval(),
        tokenizer=tokenizer,
        catalogue=catalogue,
        trie=Trie.from_sids(catalogue.sids),
        limits=Limits(),
        metrics=dict(metrics or {}),
    )
