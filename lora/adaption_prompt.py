"""The adaption prompt of LLaMA-Adapter: trained rows that the upper layers' tokens attend to.

Paper: Zhang et al., arXiv 2303.16199. Letters: P rows, M tokens of the stream, N query heads, G
key-value heads, H head width, D width. To a layer's attention over its segment it adds

    gate * softmax(q k^T / sqrt(H)) v

whose keys and values are the layer's own projections of the rows, without positions, and whose
softmax is its own. The invariant: the gate begins at 0, so a new adapter changes nothing.

The sum is taken before the output projection. PEFT projects both parts, which is the same as long
as that projection has no bias, as in LLaMA and Mistral.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lora.config import check_whole
from lora.initial import Draws


@dataclass(frozen=True, kw_only=True)
class AdaptionPromptConfig:
    """Settings of one adapter, checked when they are made.

    Raises:
        ValueError: naming the setting, what was found and what is allowed.
    """

    adapter_len: int = 10
    """Rows of each layer."""

    adapter_layers: int = 30
    """Layers that have them, counted from the last."""

    def __post_init__(self) -> None:
        check_whole("adapter_len", self.adapter_len)
        check_whole("adapter_layers", self.adapter_layers)


class AdaptionPrompt(nn.Module):
    """The rows [1, P, D] and the gate [1] of one layer, in float32, cast where they are used.

    Stands in the `prompts` of the layer's attention.
    """

    def __init__(
        self, config: AdaptionPromptConfig, width: int, draws: Draws, *, layer: str, ordinal: int
    ) -> None:
        """`layer` is the full name of the layer's attention."""
        super().__init__()
        self.config, self.name, self.ordinal = config, draws.adapter, ordinal
        self.layer = layer
        self.adaption_prompt = draws.normal(layer, 1, config.adapter_len, width)
        self.adaption_gate = nn.Parameter(torch.zeros(1, device=self.adaption_prompt.device))

    @property
    def rows(self) -> Tensor:
        """[P, D]."""
        return self.adaption_prompt[0]

    def forward(self, q_MNH: Tensor, k_PGH: Tensor, v_PGH: Tensor) -> Tensor:
        """What is added to the attention's output: [M, N, H]; of the three only q has positions."""
        q_1NMH, k_1GPH, v_1GPH = (x.transpose(0, 1)[None] for x in (q_MNH, k_PGH, v_PGH))
        out_1NMH = scaled_dot_product_attention(
            q_1NMH, k_1GPH, v_1GPH, enable_gqa=q_MNH.shape[1] != k_PGH.shape[1]
        )
        return self.adaption_gate.to(q_MNH.dtype) * out_1NMH[0].transpose(0, 1)

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.rows.shape)
