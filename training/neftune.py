"""NEFTune: uniform noise on the embedded tokens while training.

Paper: Jain et al., arXiv 2310.05914. x + alpha / sqrt(L D) * eps with eps uniform in -1 to 1. The
authors' experiments take the sample's own length for L; the hook that libraries have taken over
takes the length of the row, padded or packed. Letters: M tokens of the stream, D width. The
invariant: a token's noise is a function of seed, step, sample and position, so it is the same
however samples are packed, and none of it is there in evaluation.
"""

from typing import Literal

from torch import Tensor, nn

import kernels
from model.batch import TokenBatch
from model.decoder import Decoder

NeftuneLength = Literal["sample", "row"]
_SITE = 0x4E454654  # of its noise among all sites of the network
_SLOT = "neftune noise"  # no adapter may be called this


class NeftuneNoise(nn.Module):
    """Stands first in `Decoder.input_modules`, so rows of virtual tokens get no noise.

    row_length: L where it is the row's; None: each sample's own length.
    """

    virtual_tokens = 0

    def __init__(self, alpha: float, row_length: int | None = None) -> None:
        super().__init__()
        self.alpha, self.row_length = alpha, row_length

    def forward(
        self, x_MD: Tensor, batch: TokenBatch, dropout_seed: int | None
    ) -> tuple[Tensor, TokenBatch]:
        """The rows with their noise; as they are in evaluation."""
        if dropout_seed is None:
            return x_MD, batch
        width = x_MD.shape[1]
        keys_M = kernels.row_keys(dropout_seed, batch.sample_ids, batch.positions)
        noise_MD = kernels.uniform(keys_M, width, _SITE)
        if self.row_length is None:
            lengths = batch.segments.cu_seqlens.diff().long()
            lengths_M = lengths.repeat_interleave(lengths, output_size=len(x_MD))
            noise_MD *= self.alpha * (lengths_M * width).float().rsqrt()[:, None]
        else:
            noise_MD *= self.alpha * (self.row_length * width) ** -0.5
        return x_MD + noise_MD.to(x_MD.dtype), batch

    def extra_repr(self) -> str:
        length = "the sample" if self.row_length is None else self.row_length
        return f"alpha={self.alpha:g}, length of {length}"


def add_neftune(network: Decoder, alpha: float, row_length: int | None = None) -> None:
    """Put the noise on a network that has no adapters yet, and so stands before theirs."""
    assert not network.input_modules
    network.input_modules[_SLOT] = NeftuneNoise(alpha, row_length)
