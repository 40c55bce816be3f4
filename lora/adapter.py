"""The low-rank update of one linear layer: y += scaling * dropout(x) A^T B^T.

Paper: LoRA (Hu et al., arXiv 2106.09685). Letters: K input width, N output width, R rank. The
invariant: the initial values and the dropout site are functions of (seed, adapter name, layer
name) alone, so neither the order of attaching nor other adapters change a run.
"""

import math

import torch
from torch import nn

import kernels
from lora.config import LoraConfig
from lora.initial import Draws, stable_hash


class LoraAdapter(nn.Module):
    """A and B of one layer in float32; `kernels.lora_linear` casts them where they are used.

    lora_A: [R, K], Kaiming-uniform with a = sqrt(5), which is uniform in +-1/sqrt(K).
    lora_B: [N, R], zero, so a new adapter changes nothing.
    """

    def __init__(
        self,
        config: LoraConfig,
        in_features: int,
        out_features: int,
        *,
        adapter: str,
        layer: str,
        seed: int,
        ordinal: int = 0,
    ) -> None:
        """`adapter` and `layer` are names; the layer's, in full, also chooses rank and scaling.

        `ordinal` counts the model's adapters in the order in which they were attached, which the
        layers alone do not tell when adapters are on different ones.
        """
        super().__init__()
        self.config = config
        self.name, self.layer, self.ordinal = adapter, layer, ordinal
        self.scaling = config.scaling(layer)
        self.dropout = config.lora_dropout
        self.site = stable_hash(adapter, layer) % 2**31
        rank = config.rank(layer)
        draws, bound = Draws(seed, adapter, torch.device("cpu")), 1.0 / math.sqrt(in_features)
        self.lora_A = draws.uniform(layer, rank, in_features, bound=bound)
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))

    def low_rank(self) -> kernels.LowRank:
        return kernels.LowRank(self.lora_A, self.lora_B, self.scaling, self.dropout, self.site)

    def extra_repr(self) -> str:
        rank, in_features = self.lora_A.shape
        return (
            f"{in_features}, {self.lora_B.shape[0]}, r={rank}, scaling={self.scaling:g}, "
            f"dropout={self.dropout:g}"
        )
