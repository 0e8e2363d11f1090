"""A bundle of any architecture comes back as that architecture; a foreign configuration is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from features.histories.context import cold_context
from features.histories.windows import Limits
from models.architectures import describe, model_of
from models.bundle import Bundle, BundleCorrupt, save
from models.generator import GeneratorConfig
from models.naive import NaiveConfig
from models.onerec_session import SessionConfig
from models.onerec_v1 import V1Config
from models.onerec_v2 import V2Config
from models.pathways import to_tensors
from models.tokenizer.tokenizer import Tokenizer
from models.tokenizer.vocabulary import Catalogue
from models.training.checkpoint import load_weights

SIZES: dict[str, Any] = {"codes": 8, "levels": 3, "d_model": 16, "heads": 2, "kv_groups": 1, "embed": 8}
CONFIGS: list[GeneratorConfig] = [
    V2Config(**SIZES, layers=3, experts=4, expert_width=8),
    V1Config(**SIZES, queries=4),
    SessionConfig(**SIZES, queries=4),
    NaiveConfig(**SIZES, layers=1),
]
LIMITS = Limits(short=3, positive=4, lifelong=5)


@pytest.fixture(params=CONFIGS, ids=lambda config: describe(config)[0])
def folder(request: pytest.FixtureRequest, tiny_tokenizer: tuple[Tokenizer, Catalogue], tmp_path: Path) -> Path:
    tokenizer, catalogue = tiny_tokenizer
    model = model_of(request.param)
    return save(tmp_path, model=model, tokenizer=tokenizer, catalogue=catalogue, limits=LIMITS, metrics={})


def test_every_architecture_goes_through_a_bundle(folder: Path) -> None:
    stored = json.loads((folder / "config.json").read_text())
    bundle = Bundle.load(folder)
    assert describe(bundle.model) == (stored["architecture"], stored["model"])
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in bundle.model.state_dict().items())
    context = to_tensors(cold_context(2, LIMITS), bundle.catalogue)
    logits, _ = bundle.model.step(bundle.model.encode(context), None, None)
    assert logits.shape == (2, 1, 8)
    assert torch.isfinite(logits).all()


def test_weights_under_another_architecture_s_name_are_refused(folder: Path) -> None:
    stored = json.loads((folder / "config.json").read_text())
    other = "onerec_v2" if stored["architecture"] != "onerec_v2" else "onerec_v1"
    (folder / "config.json").write_text(json.dumps({**stored, "architecture": other}))
    with pytest.raises(BundleCorrupt, match=r"has no|Missing key"):
        Bundle.load(folder)
    (folder / "config.json").write_text(json.dumps({**stored, "architecture": "gpt"}))
    with pytest.raises(BundleCorrupt, match="unknown architecture 'gpt'"):
        Bundle.load(folder)


def test_training_does_not_go_on_from_another_architecture(folder: Path) -> None:
    kind = json.loads((folder / "config.json").read_text())["architecture"]
    config = next(c for c in CONFIGS if describe(c)[0] != kind)
    with pytest.raises(ValueError, match=f"are of a {kind} model"):
        load_weights(model_of(config), folder, config)
