"""Prefix tuning: trained keys and values in front of each segment's own, in every layer.

Paper: Li and Liang, arXiv 2101.00190. Letters: P prefix tokens, L layers, G key-value heads, H head
width. The prefix has no positions of its own; the tokens behind it begin at position P, as in PEFT.
With a projection the keys and values come from a small network, which serves the training alone: a
trained adapter keeps what it gives.
"""

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from lora.config import check_whole
from lora.initial import Draws
from model.config import DecoderConfig


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig:
    """Settings of one adapter, checked when they are made.

    Raises:
        ValueError: naming the setting, what was found and what is allowed.
    """

    num_virtual_tokens: int = 20
    """Keys and values in front of each segment."""

    prefix_projection: bool = False
    """Make them from an embedding of the width of a key, by linear, tanh, linear."""

    encoder_hidden_size: int | None = None
    """The width between; None is that of a key."""

    def __post_init__(self) -> None:
        check_whole("num_virtual_tokens", self.num_virtual_tokens)
        if self.prefix_projection not in (True, False):
            raise ValueError(
                f"prefix_projection must be true or false, found {self.prefix_projection!r}"
            )
        if self.encoder_hidden_size is not None:
            check_whole("encoder_hidden_size", self.encoder_hidden_size)


class Prefix(nn.Module):
    """An embedding [P, 2 L G H], or one of [P, G H] and the network that widens it.

    Stands in `Decoder.prefixes`. float32, cast where it is used. An adapter that was read from a
    folder has no network, because PEFT's files hold the keys and values that it gave.
    """

    def __init__(
        self,
        config: PrefixTuningConfig,
        shape: DecoderConfig,
        draws: Draws,
        *,
        encoded: bool,
        ordinal: int,
    ) -> None:
        """encoded: without the network, whatever the settings say."""
        super().__init__()
        self.config, self.name, self.ordinal = config, draws.adapter, ordinal
        heads = (shape.num_key_value_heads, shape.head_dim)
        self._shape = (config.num_virtual_tokens, shape.num_hidden_layers, 2, *heads)
        width = heads[0] * heads[1]
        outputs = 2 * shape.num_hidden_layers * width
        self.encoder: nn.Module | None = None
        if config.prefix_projection and not encoded:
            hidden = config.encoder_hidden_size or width
            self.encoder = nn.Sequential(
                draws.linear("transform.0", width, hidden),
                nn.Tanh(),
                draws.linear("transform.2", hidden, outputs),
            )
            outputs = width
        self.embedding = draws.normal("embedding", config.num_virtual_tokens, outputs)

    @property
    def prefix_tokens(self) -> int:
        return len(self.embedding)

    def rows(self) -> Tensor:
        """[P, 2 L G H]: of each layer the keys, then the values."""
        return (
            self.embedding if self.encoder is None else cast(Tensor, self.encoder(self.embedding))
        )

    def forward(self) -> Tensor:
        """[P, L, 2, G, H]."""
        return self.rows().view(self._shape)

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.embedding.shape)
