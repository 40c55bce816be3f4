"""Routing and the grouped operation against every expert computed for every token, in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels import LinearOperands, LowRank
from tests.kernels.test_reference import agree, make

TOKENS, EXPERTS, TOP_K = 11, 5, 2


def routed() -> tuple[Tensor, Tensor, Tensor, kernels.Routing]:
    """Logits, the weights as a dense [M, E] matrix and as [M, J], and the routing; one is idle."""
    logits = make(TOKENS, EXPERTS)
    with torch.no_grad():
        logits[:, 3] = -9.0  # never among the two largest
    weights, routing = kernels.route(logits, TOP_K)
    probabilities = logits.softmax(-1)
    chosen = probabilities >= probabilities.topk(TOP_K, -1).values[:, -1:]
    dense = probabilities * chosen
    return logits, dense / dense.sum(-1, keepdim=True), weights, routing


def test_routing_weighs_the_largest_and_sorts_their_rows() -> None:
    logits, dense, weights, routing = routed()
    order, places, offsets = routing
    experts = torch.bucketize(torch.arange(TOKENS * TOP_K), offsets[1:], right=True)
    assert torch.equal(order[places.flatten()], torch.arange(TOKENS * TOP_K))
    assert offsets.tolist()[0] == 0
    assert offsets.tolist()[-1] == TOKENS * TOP_K
    assert offsets[3] == offsets[4]  # the idle one
    for expert in range(EXPERTS):  # the tokens' own order inside an expert
        rows = order[offsets[expert] : offsets[expert + 1]]
        assert torch.equal(rows, rows.sort().values)
    spread = torch.zeros_like(dense).scatter(1, experts[places], weights)
    agree(spread, dense, [logits])


def test_routing_weights_are_float32_of_narrow_logits() -> None:
    weights, _ = kernels.route(torch.randn(3, 4).bfloat16(), 2)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(3))


def test_dispatch_and_combine_are_a_weighted_sum_of_copies() -> None:
    _, dense, weights, routing = routed()
    x, weights = make(TOKENS, 6), weights.detach().requires_grad_()
    copies = kernels.dispatch(x, routing)
    assert torch.equal(copies, x[routing.order // TOP_K])
    # Each expert e multiplies its rows by e + 1.
    factors = torch.arange(1.0, EXPERTS + 1).double()
    grown = copies * factors.repeat_interleave(routing.offsets.diff())[:, None]
    ours = kernels.combine(grown, weights, routing)
    torch.testing.assert_close(ours, (dense * factors).sum(-1, keepdim=True) * x)
    repeated = x.repeat_interleave(TOP_K, 0)[routing.order]
    plain = repeated * factors.repeat_interleave(routing.offsets.diff())[:, None]
    agree(ours, (plain[routing.places] * weights[..., None]).sum(1), [x, weights])


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_each_expert_is_a_lora_linear_of_its_own_rows(p: float, num_layers: int) -> None:
    _, _, _, routing = routed()
    rows, width = TOKENS * TOP_K, 7
    x = make(rows, width)
    token_keys = kernels.row_keys(5, torch.arange(TOKENS), torch.arange(TOKENS))
    keys = token_keys[routing.order // TOP_K]
    inputs, experts = [x], []
    for expert in range(EXPERTS):
        layers = []
        for layer in range(num_layers):
            seed = 100 * expert + 10 * layer
            weight = make(4, width, seed=seed)
            adapters = ()
            if expert != 1:  # one expert has none
                a, b = make(2 + expert, width, seed=seed + 1), make(4, 2 + expert, seed=seed + 2)
                adapters = (LowRank(a, b, 0.5, p, seed),)
                inputs += [a, b]
            inputs.append(weight)
            layers.append(LinearOperands(weight, None, adapters))
        experts.append(tuple(layers))
    ours = kernels.grouped_lora_linear(x, experts, routing.offsets, keys)
    of_row = torch.bucketize(torch.arange(rows), routing.offsets[1:], right=True)
    truth = []
    for layer in range(num_layers):
        total = torch.zeros(rows, 4, dtype=torch.float64)
        for expert in range(EXPERTS):
            own = (of_row == expert).double()[:, None]
            operands = experts[expert][layer]
            total = total + own * F.linear(x, operands.weight)
            for adapter in operands.adapters:
                kept = kernels.keep_mask(keys, width, adapter.dropout, adapter.site).double()
                dropped = x * kept / (1 - round(p * 2**16) / 2**16)
                total = total + own * adapter.scaling * dropped @ adapter.A.T @ adapter.B.T
        truth.append(total)
    agree(torch.cat(ours, 1), torch.cat(truth, 1), inputs)  # the idle expert's gradients are zeros


def test_an_idle_expert_costs_nothing_in_evaluation() -> None:
    weight = torch.full((2, 3), float("nan"))
    experts = [(LinearOperands(torch.ones(2, 3), None),), (LinearOperands(weight, None),)]
    with torch.no_grad():
        (y,) = kernels.grouped_lora_linear(torch.ones(4, 3), experts, torch.tensor([0, 4, 4]))
    assert torch.equal(y, torch.full((4, 2), 3.0))
