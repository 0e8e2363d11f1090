import pytest
import torch
import torch.nn.functional as F

from models.nn.moe import MoE, balance


def skewed(experts: int = 8, active: int = 1) -> MoE:
    """One expert is the first choice of half the tokens and more."""
    torch.manual_seed(0)
    moe = MoE(16, 8, experts=experts, active=active, shared=0).train()
    with torch.no_grad():
        moe.router.weight.mul_(0.5)
        moe.router.weight[3, 0] += 4.0  # the first coordinate of more than half of the tokens is positive
    return moe


def batch(tokens: int = 4096) -> torch.Tensor:
    return torch.randn(tokens, 16) + torch.tensor([0.3] + [0.0] * 15)


def load_of(moe: MoE, tokens: int = 4096) -> torch.Tensor:
    """Share of the tokens that each expert gets."""
    moe.load = None
    moe(batch(tokens))
    assert moe.load is not None
    load: torch.Tensor = moe.load / tokens
    return load


@pytest.mark.parametrize("active", [1, 2])
def test_the_bias_evens_out_a_skewed_router(active: int) -> None:
    moe = skewed(active=active)
    assert load_of(moe)[3] >= 0.5
    for _ in range(150):
        moe(batch())
        balance(moe, 1e-2)
    for _ in range(100):  # the default u settles what the larger one left swinging
        moe(batch())
        stats = balance(moe)
    assert stats["moe/max_over_mean"] < 1.2
    assert stats["moe/idle"] == 0
    fresh = load_of(moe, 20_000)
    assert fresh.max() / fresh.mean() < 1.2


def test_gates_do_not_feel_the_bias() -> None:
    moe = skewed(active=2)
    x = torch.randn(50, 16)
    with torch.no_grad():
        moe.bias[:] = torch.linspace(-5, 5, 8)  # experts 6 and 7 for everybody
    chosen, gates = moe.route(x)
    assert set(chosen.flatten().tolist()) == {6, 7}
    scores = F.linear(x, moe.router.weight).sigmoid().gather(1, chosen)
    torch.testing.assert_close(gates, scores / scores.sum(1, keepdim=True))


@pytest.mark.parametrize("shared", [0, 2])
def test_grouped_experts_equal_a_loop_over_tokens(shared: int) -> None:
    torch.manual_seed(1)
    moe = MoE(16, 8, experts=6, active=3, shared=shared)
    x = torch.randn(2, 5, 16, requires_grad=True)
    y = moe(x)
    y.square().sum().backward()
    grads = [x.grad, moe.input.grad, moe.router.weight.grad]
    again = x.detach().clone().requires_grad_()
    moe.zero_grad()
    rows = []
    for token in again.flatten(0, 1):
        chosen, gates = moe.route(token[None])
        row = torch.zeros(16)
        for expert, gate in zip(chosen[0], gates[0], strict=True):
            g, up = (token @ moe.input[expert]).chunk(2)
            row = row + gate * ((F.silu(g) * up) @ moe.output[expert])
        if moe.shared_input is not None and moe.shared_output is not None:
            g, up = moe.shared_input(token).chunk(2)
            row = row + moe.shared_output(F.silu(g) * up)
        rows.append(row)
    plain = torch.stack(rows).view(2, 5, 16)
    torch.testing.assert_close(y, plain, atol=1e-5, rtol=1e-4)
    plain.square().sum().backward()
    for mine, theirs in zip(grads, [again.grad, moe.input.grad, moe.router.weight.grad], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


def test_balance_counts_since_the_last_call_and_leaves_evaluation_alone() -> None:
    moe = skewed()
    assert balance(moe) == {}
    moe.eval()
    moe(torch.randn(10, 16))
    assert balance(moe) == {}
    moe.train()
    moe(torch.randn(10, 16))
    moe(torch.randn(10, 16))
    assert moe.load is not None
    assert moe.load.sum() == 20
    before = moe.bias.clone()
    load = moe.load.clone()
    balance(moe, 0.5)
    torch.testing.assert_close(moe.bias - before, 0.5 * torch.sign(load.mean() - load))
    assert moe.load is None
    assert not [name for name, _ in moe.named_buffers() if "load" in name]


def test_padding_is_no_load() -> None:
    moe = skewed()
    x = torch.randn(2, 6, 16)
    moe(x, torch.tensor([[True] * 4 + [False] * 2, [False] * 6]))
    assert moe.load is not None
    padded, moe.load = moe.load, None
    moe(x[:1, :4])
    assert moe.load is not None
    torch.testing.assert_close(padded, moe.load)


@pytest.mark.parametrize(("active", "width"), [(8, 16), (0, 16), (2, 12)])
def test_impossible_mixtures_are_refused(active: int, width: int) -> None:
    with pytest.raises(ValueError, match="more experts than"):
        MoE(width, 8, experts=8, active=active, shared=0)
