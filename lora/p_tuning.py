"""P-tuning: virtual tokens that a small network makes from a trained embedding.

Paper: Liu et al., arXiv 2103.10385; the two networks are those of PEFT. Letters: P virtual tokens,
D width, E the encoder's width. The network serves the training alone: of a trained adapter only
the P rows that it gives are kept, and they are prompt tuning's. The invariant: its dropout is a
function of (step, adapter, layer, row), so every micro-batch and every rank sees the same rows.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

import kernels
from lora.config import check_share, check_whole
from lora.initial import Draws, stable_hash

ENCODERS = ("mlp", "lstm")


@dataclass(frozen=True, kw_only=True)
class PTuningConfig:
    """Settings of one adapter, checked when they are made.

    Raises:
        ValueError: naming the setting, what was found and what is allowed.
    """

    num_virtual_tokens: int = 20
    """Rows in front of each segment."""

    encoder: str = "mlp"
    """The network: three linear layers, or a bidirectional LSTM and two linear layers."""

    encoder_hidden_size: int | None = None
    """Its width; None is the base's."""

    encoder_num_layers: int = 2
    """Layers of the LSTM."""

    encoder_dropout: float = 0.0
    """Share of the values between two layers of the LSTM that are set to zero in training."""

    def __post_init__(self) -> None:
        check_whole("num_virtual_tokens", self.num_virtual_tokens)
        if self.encoder not in ENCODERS:
            raise ValueError(
                f"encoder must be one of {', '.join(ENCODERS)}, found {self.encoder!r}"
            )
        if self.encoder_hidden_size is not None:
            check_whole("encoder_hidden_size", self.encoder_hidden_size)
        check_whole("encoder_num_layers", self.encoder_num_layers, largest=1024)
        check_share("encoder_dropout", self.encoder_dropout)


class MLPEncoder(nn.Module):
    """linear, relu, linear, relu, linear: [P, D] -> [P, D]."""

    def __init__(self, width: int, hidden: int, draws: Draws) -> None:
        super().__init__()
        self.mlp_head = nn.Sequential(
            draws.linear("mlp_head.0", width, hidden),
            nn.ReLU(),
            draws.linear("mlp_head.2", hidden, hidden),
            nn.ReLU(),
            draws.linear("mlp_head.4", hidden, width),
        )

    def forward(self, x_PD: Tensor, dropout_seed: int | None) -> Tensor:
        return cast(Tensor, self.mlp_head(x_PD))


class LSTMEncoder(nn.Module):
    """A bidirectional LSTM over the P rows, then linear, relu, linear: [P, D] -> [P, D].

    Its layers are modules of one layer each, for torch's dropout between them is no function of
    the step.
    """

    def __init__(self, width: int, hidden: int, layers: int, dropout: float, draws: Draws) -> None:
        super().__init__()
        self.dropout = dropout
        self.sites = [stable_hash(draws.adapter, f"lstm_head.{i}") % 2**31 for i in range(layers)]
        self.lstm_head = nn.ModuleList()
        for i in range(layers):
            lstm = nn.LSTM(2 * hidden if i else width, hidden, bidirectional=True, device="meta")
            for name, parameter in list(lstm.named_parameters()):
                drawn = draws.uniform(f"lstm_head.{i}.{name}", *parameter.shape, bound=hidden**-0.5)
                setattr(lstm, name, drawn)
            lstm.flatten_parameters()  # as cuDNN wants them
            self.lstm_head.append(lstm)
        self.mlp_head = nn.Sequential(
            draws.linear("mlp_head.0", 2 * hidden, 2 * hidden),
            nn.ReLU(),
            draws.linear("mlp_head.2", 2 * hidden, width),
        )

    def forward(self, x_PD: Tensor, dropout_seed: int | None) -> Tensor:
        keys = None
        if dropout_seed is not None and self.dropout:
            places = torch.arange(len(x_PD), device=x_PD.device)
            keys = kernels.row_keys(dropout_seed, torch.full_like(places, -1), places)
        for i, (lstm, site) in enumerate(zip(self.lstm_head, self.sites, strict=True)):
            if i:
                x_PD = kernels.dropout(x_PD, self.dropout, keys, site)
            x_PD, _ = lstm(x_PD)
        return cast(Tensor, self.mlp_head(x_PD))


def make_encoder(config: PTuningConfig, width: int, draws: Draws) -> MLPEncoder | LSTMEncoder:
    """A new encoder of a base of this width."""
    hidden = config.encoder_hidden_size or width
    if config.encoder == "mlp":
        return MLPEncoder(width, hidden, draws)
    return LSTMEncoder(width, hidden, config.encoder_num_layers, config.encoder_dropout, draws)
