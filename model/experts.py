"""The sparse MLP of Mixtral (Jiang et al., arXiv 2401.04088): a router and E experts, J a token.

Letters: M tokens, D width, F feed-forward width of one expert, E experts, J experts of one token.
Parameters carry the names of the published checkpoints (`block_sparse_moe.gate`,
`block_sparse_moe.experts.0.w1`, ...); each expert is three linear layers with slots of their own,
so adapters, merging and int8 weights need to know nothing of experts. The invariant: a token's
result depends on its own row alone, and no token is ever dropped, however unevenly they fall.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

import kernels
from model.activations import RowsOf, made_again
from model.config import DecoderConfig
from model.linear import Linear, linear_group_of_experts


class Expert(nn.Module):
    """SwiGLU under its older names: w2(silu(w1(x)) * w3(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.hidden_size, config.intermediate_size)
        self.w2 = Linear(config.intermediate_size, config.hidden_size)
        self.w3 = Linear(config.hidden_size, config.intermediate_size)


class SparseMLP(nn.Module):
    """The sum of each token's J experts, weighed by the router."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        # A rounding here would send tokens to other experts.
        self.gate = Linear(config.hidden_size, config.num_local_experts, stays_floating=True)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.num_local_experts))

    def forward(
        self,
        x_MD: Tensor,
        dropout_keys: Tensor | None,
        rows_of: RowsOf,
        *,
        selective: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """[M, D] -> [M, D], and the router's logits [M, E].

        rows_of: makes chosen rows of x_MD again; with `selective` nothing keeps them.
        """
        logits_ME = self.gate(x_MD, dropout_keys)
        weights_MJ, routing = kernels.route(logits_ME, self.top_k)
        keys = None if dropout_keys is None else dropout_keys[routing.order // self.top_k]
        rows = kernels.dispatch(x_MD, routing)
        into, out_of = self.layers()
        with made_again(
            rows, lambda some: rows_of(routing.order[some] // self.top_k), selective=selective
        ):
            gate, up = linear_group_of_experts(into, rows, routing.offsets, keys)
        # Of this product each expert would make its own rows, and silu in vectors of other numbers
        # than before, which is not the same bits: it is kept.
        (y,) = linear_group_of_experts(out_of, kernels.swiglu(gate, up), routing.offsets, keys)
        return kernels.combine(y, weights_MJ, routing), logits_ME

    def layers(self) -> tuple[list[tuple[Linear, ...]], list[tuple[Linear, ...]]]:
        """Of each expert the layers that read the tokens, and the one that reads their product."""
        experts = cast(Sequence[Expert], self.experts)
        return [(expert.w1, expert.w3) for expert in experts], [(expert.w2,) for expert in experts]


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """E * sum over e of f_e * P_e: J where experts are used alike, up to E where J of them are.

    f_e is how many of the tokens' choices fell on expert e and P_e the mean of its probability,
    both over the tokens of all layers together (Fedus et al., arXiv 2101.03961, as in
    transformers). Only P_e has a gradient.

    Args:
        router_logits: of each layer [M, E], of real tokens; there is no padding to leave out.

    Returns:
        A scalar, float32 or wider.
    """
    logits = torch.stack(tuple(router_logits))
    experts = logits.shape[-1]
    probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    chosen = probabilities.topk(top_k, dim=-1).indices
    is_chosen = chosen[..., None] == torch.arange(experts, device=chosen.device)
    tokens = logits[..., 0].numel()
    shares = is_chosen.sum((0, 1, 2), dtype=probabilities.dtype) / tokens
    return experts * (shares * probabilities.mean((0, 1))).sum()
