"""Random weights and random contexts for tests of the networks."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from features.schema import FLAGS
from models.generator import GeneratorConfig
from models.pathways import NUMERIC, ContextTensors

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def shaken(model: M) -> M:
    """The model for inference, all of its weights random and large enough to matter."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def behaviours(config: GeneratorConfig, kind: Tensor, mask: Tensor, draw: torch.Generator) -> ContextTensors:
    """Behaviours of the model's vocabulary where ``mask`` [B, N] is true; ``kind`` [N] is the pathway of each slot."""
    requests, c = len(mask), config
    return ContextTensors(
        static=torch.randint(0, c.static_buckets, (requests, c.static_fields), generator=draw),
        sids=torch.randint(1, c.codes + 1, (*mask.shape, c.levels), generator=draw) * mask[..., None],
        author=torch.randint(0, c.author_buckets, mask.shape, generator=draw) * mask,
        tag=torch.randint(0, c.tag_buckets, mask.shape, generator=draw) * mask,
        numeric=torch.randn(*mask.shape, len(NUMERIC), generator=draw) * mask[..., None],
        labels=torch.randint(0, 2, (*mask.shape, len(FLAGS)), generator=draw).float() * mask[..., None],
        kind=kind,
        mask=mask,
    )
