"""Prompt tuning: trained rows in front of the embedded tokens, and nothing else.

Paper: Lester et al., arXiv 2104.08691. Letters: P virtual tokens, D width, M tokens of the stream.
The invariant: every segment stands behind the same P rows, at positions 0 to P - 1, so a note's
result does not depend on its neighbours. Labels begin with the tokens, whose first one is predicted
by the last virtual row, as in PEFT.
"""

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from lora.config import check_whole
from lora.p_tuning import LSTMEncoder, MLPEncoder, PTuningConfig
from model.batch import TokenBatch

INITS = ("random", "text")


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig:
    """Settings of one adapter, checked when they are made.

    Raises:
        ValueError: naming the setting, what was found and what is allowed.
    """

    num_virtual_tokens: int = 20
    """Rows in front of each segment."""

    init: str = "random"
    """Their first values: standard normal, or the embeddings of a text's tokens."""

    init_text: str | None = None
    """That text; its tokens are repeated until they are enough."""

    def __post_init__(self) -> None:
        check_whole("num_virtual_tokens", self.num_virtual_tokens)
        if self.init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, found {self.init!r}")
        if self.init == "text" and not self.init_text:
            raise ValueError("init text needs init_text, the text whose tokens the rows begin as")


class VirtualTokens(nn.Module):
    """Rows in front of each segment: an embedding [P, D], or what an encoder makes of it.

    Stands in `Decoder.input_modules`. float32, cast where it is used. An adapter that was read from
    a folder has no encoder, because PEFT's files hold the rows that it gave.
    """

    def __init__(
        self,
        config: PromptTuningConfig | PTuningConfig,
        embedding: nn.Parameter,
        encoder: MLPEncoder | LSTMEncoder | None,
        *,
        adapter: str,
        ordinal: int,
    ) -> None:
        super().__init__()
        self.config, self.name, self.ordinal = config, adapter, ordinal
        self.embedding = embedding
        self.encoder = encoder

    @property
    def virtual_tokens(self) -> int:
        return len(self.embedding)

    def rows(self, dropout_seed: int | None = None) -> Tensor:
        """[P, D]."""
        if self.encoder is None:
            return self.embedding
        return cast(Tensor, self.encoder(self.embedding, dropout_seed))

    def forward(
        self, x_MD: Tensor, batch: TokenBatch, dropout_seed: int | None
    ) -> tuple[Tensor, TokenBatch]:
        """The rows in front of each segment of x, and the batch that has their places."""
        batch, behind = batch.behind(self.virtual_tokens)
        return behind.join(self.rows(dropout_seed).to(x_MD.dtype), x_MD), batch

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.embedding.shape)
