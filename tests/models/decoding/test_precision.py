import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from drawn import shaken

from models.architectures import model_of
from models.decoding.beam import beam_search
from models.decoding.precision import for_serving
from models.decoding.trie import Trie
from models.generator import ContextKV, GeneratorConfig
from models.onerec_v1 import V1Config
from models.onerec_v2 import OneRecV2, V2Config

SIZES: dict[str, Any] = {"codes": 7, "d_model": 16, "heads": 4, "kv_groups": 2, "embed": 8}
EXPERTS: dict[str, Any] = {"experts": 4, "active_experts": 2, "expert_width": 8}


@pytest.mark.parametrize(
    "config",
    [V2Config(**SIZES), V2Config(**SIZES, **EXPERTS), V1Config(**SIZES, **EXPERTS, decoder_layers=1, ffn=16)],
    ids=["v2", "v2-moe", "v1-moe"],
)
def test_bf16_weights_are_autocast_done_once(config: GeneratorConfig, random_kv: Callable[[int], ContextKV]) -> None:
    """The same numbers, bit for bit; the original, its heads and routers stay fp32."""
    torch.manual_seed(0)
    model = shaken(model_of(config))
    rounded, kv = for_serving(model), random_kv(3)
    trie = Trie.from_sids(np.random.default_rng(0).integers(0, 7, (90, 3)))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        first, second = (beam_search(each, kv, trie, 16) for each in (model, rounded))
    assert (first.log_probs == second.log_probs).all()
    assert (first.sids == second.sids).all()
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert {weight.dtype for weight in rounded.heads.parameters()} == {torch.float32}
    assert torch.bfloat16 in {weight.dtype for weight in rounded.parameters()}


def test_one_copy_a_model_and_none_when_the_model_is_gone(model: OneRecV2) -> None:
    assert for_serving(model) is for_serving(model)
    own = OneRecV2(model.config)
    copy = weakref.ref(for_serving(own))
    del own
    gc.collect()
    assert copy() is None
