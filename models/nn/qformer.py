"""QFormer: learned queries that read a long sequence and stand for it afterwards (OneRec V1, arXiv 2506.13695, 2.2.1).

``Q <- Q + CrossAttn(Q, M, M); Q <- Q + FFN(RMSNorm(Q))``, pre-RMSNorm with residuals. A learned null token precedes
``M``, so that an empty sequence has something to be read.

Shapes: B sequences, S tokens, q queries, d width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.nn.blocks import RMSNorm, SwiGLU


class QFormer(nn.Module):
    """[B, S, d] tokens to [B, queries, d]."""

    def __init__(self, width: int, heads: int, *, queries: int, blocks: int, hidden: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.1)
        self.null = nn.Parameter(torch.randn(width) * 0.1)
        self.blocks = nn.ModuleList(QueryBlock(width, heads, hidden) for _ in range(blocks))

    def forward(self, memory_BSd: Tensor, bias_BS: Tensor) -> Tensor:
        """What the queries took from the tokens whose ``bias_BS`` is 0 (-inf hides one)."""
        b = len(memory_BSd)
        memory = torch.cat([self.null.expand(b, 1, -1).to(memory_BSd.dtype), memory_BSd], 1)
        bias = F.pad(bias_BS, (1, 0))
        q = self.queries.expand(b, -1, -1)
        for block in self.blocks:
            q = block(q, memory, bias)
        return q


class QueryBlock(nn.Module):
    """One round of reading and thinking."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm, self.memory_norm, self.ffn_norm = (RMSNorm(width) for _ in range(3))
        self.query = nn.Linear(width, width, bias=False)
        self.keys = nn.Linear(width, 2 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.ffn = SwiGLU(width, hidden)

    def forward(self, q_Bqd: Tensor, memory_BSd: Tensor, bias_BS: Tensor) -> Tensor:
        """[B, q, d]."""
        query = self.query(self.query_norm(q_Bqd)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        key, value = self.keys(self.memory_norm(memory_BSd)).unflatten(2, (2, self.heads, -1)).unbind(2)
        mask = bias_BS[:, None, None].to(query.dtype)
        read = F.scaled_dot_product_attention(query, key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask)
        q = q_Bqd + self.output(read.transpose(1, 2).flatten(2))
        return q + self.ffn(self.ffn_norm(q))
