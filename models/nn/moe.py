"""Mixture of experts with loss-free balancing (OneRec V1, arXiv 2506.13695, 2.2.3, after DeepSeek-V3, 2412.19437).

Tokens go to the ``active`` experts of the highest sigmoid score plus a bias per expert. The bias steers the choice
only: gates are the unbiased scores, normalised over the chosen. After each optimizer step ``balance(model, u)`` moves
the bias by ``u * sign(mean load - load)``: no gradient, no auxiliary loss. Tokens are sorted by expert, and all
experts run as one grouped matrix product. Left out: capacity limits (no token is dropped), expert parallelism.

Shapes: N tokens, d model width, h inner width of an expert, E experts, k active ones.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.nn.fused import silu_gate
from models.nn.precision import compute_dtype, exact

UPDATE = 1e-3
"""DeepSeek-V3's u."""


class MoE(nn.Module):
    """``active`` of ``experts`` SwiGLU experts per token, and ``shared`` ones for every token."""

    def __init__(self, width: int, hidden: int, *, experts: int, active: int, shared: int) -> None:
        super().__init__()
        if not 0 < active < experts or width % 8 or hidden % 8:
            raise ValueError(
                f"{active} active of {experts} experts, widths {width} and {hidden}: there must be more experts than "
                "active ones, and widths that are multiples of 8 (rows of a grouped product start at 16 bytes)"
            )
        self.active = active
        self.router = nn.Linear(width, experts, bias=False)
        self.input = nn.Parameter(torch.empty(experts, width, 2 * hidden))
        self.output = nn.Parameter(torch.empty(experts, hidden, width))
        self.shared_input = nn.Linear(width, 2 * shared * hidden, bias=False) if shared else None
        self.shared_output = nn.Linear(shared * hidden, width, bias=False) if shared else None
        self.bias: Tensor
        self.register_buffer("bias", torch.zeros(experts))
        self.load: Tensor | None = None
        """Tokens sent to each expert [E] since the last ``balance``; no buffer, or DDP would overwrite it."""
        for weight in (self.input, self.output):
            nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)  # as nn.Linear does

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """Same shape as ``x`` [..., d]; tokens that are not ``real`` [...] do not count as load."""
        tokens = x.flatten(0, -2)
        chosen, gates = self.route(tokens)
        if self.training:
            self._count(chosen, real)
        routed = self._experts(tokens, chosen)
        y = (routed * gates.unsqueeze(-1).to(routed.dtype)).sum(1)
        if self.shared_input is not None and self.shared_output is not None:
            y = y + self.shared_output(silu_gate(self.shared_input(tokens)))
        return y.view(x.shape)

    def route(self, x_Nd: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts [N, k] and their gates [N, k] fp32, which sum to 1."""
        with exact(x_Nd.device):
            scores = F.linear(x_Nd.float(), self.router.weight.float()).sigmoid()
        chosen = (scores + self.bias).topk(self.active, -1).indices
        gates = scores.gather(-1, chosen)
        return chosen, gates / gates.sum(-1, keepdim=True).clamp(min=1e-9)

    @torch.no_grad()
    def _count(self, chosen_Nk: Tensor, real: Tensor | None) -> None:
        tokens = torch.ones(len(chosen_Nk), device=chosen_Nk.device) if real is None else real.flatten().float()
        load = torch.zeros_like(self.bias)
        load.index_add_(0, chosen_Nk.flatten(), tokens.repeat_interleave(self.active))
        self.load = load if self.load is None else self.load + load

    def _experts(self, x_Nd: Tensor, chosen_Nk: Tensor) -> Tensor:
        """[N, k, d], the output of each chosen expert."""
        dtype = compute_dtype(x_Nd.device, x_Nd.dtype)
        expert, order = chosen_Nk.flatten().sort(stable=True)
        bounds = torch.arange(1, len(self.bias) + 1, device=expert.device)
        ends = torch.searchsorted(expert, bounds).int()
        rows = x_Nd.to(dtype)[order // self.active]
        inner = silu_gate(F.grouped_mm(rows, self.input.to(dtype), offs=ends))
        out = F.grouped_mm(inner, self.output.to(dtype), offs=ends)
        back = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
        return out[back].view(*chosen_Nk.shape, -1)


@torch.no_grad()
def balance(model: nn.Module, u: float = UPDATE) -> dict[str, float]:
    """Moves every router's bias toward even load, once per optimizer step; returns the load's statistics.

    ``bias_i += u * sign(mean load - load_i)`` over the tokens since the last call, of all workers. The statistics are
    the worst layer's ``moe/max_over_mean`` load and the mean share of ``moe/idle`` experts; without MoE layers, or
    without tokens, there are none.
    """
    layers = [module for module in model.modules() if isinstance(module, MoE) and module.load is not None]
    if not layers:
        return {}
    loads = torch.stack([layer.load for layer in layers if layer.load is not None])
    if dist.is_initialized():
        dist.all_reduce(loads)
    mean = loads.mean(-1, keepdim=True)
    for layer, step in zip(layers, u * torch.sign(mean - loads), strict=True):
        layer.bias += step
        layer.load = None
    worst = float((loads.amax(-1) / mean.squeeze(-1).clamp(min=1e-9)).max())
    return {"moe/max_over_mean": worst, "moe/idle": float((loads == 0).float().mean())}
