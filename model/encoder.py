"""The BERT encoder (Devlin et al., arXiv 1810.04805) and the classifier of whole notes on it.

Letters: M tokens of the stream, n segments (notes), D width, N heads, H head width, F feed-forward
width, C classes. Parameters carry the names of Hugging Face checkpoints (`bert.embeddings...`,
`bert.encoder.layer.0.attention.self.query`, ...). BlueBERT, Bio+ClinicalBERT and CORe are this
network with other weights. A note is one segment of token type 0, [CLS] first and [SEP] last.

Attention looks both ways inside a segment. The invariant: a row depends on its own segment alone,
so there is no padding, and a note's logits are the same whatever is packed beside it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from model.activations import Activations, made_again, run_block
from model.attention import attend
from model.batch import Chosen, TokenBatch
from model.config import EncoderConfig
from model.heads import Classifier
from model.linear import Linear, linear_group

# Where dropout draws (see `kernels.keep_mask`): here, and at two places of each layer from _LAYERS.
_EMBEDDINGS, _CLASSIFIER, _LAYERS = 0, 1, 2


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(variance + eps) * weight + bias (Ba et al., arXiv 1607.06450)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """x: [M, D] -> [M, D]; statistics are float32 or wider."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Embeddings(nn.Module):
    """Of the word, its position in the segment and token type 0: summed and normalised."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config)
        self.dropout = config.hidden_dropout_prob

    def forward(self, batch: TokenBatch, dtype: torch.dtype, dropout_keys: Tensor | None) -> Tensor:
        x_MD = (
            F.embedding(batch.input_ids, self.word_embeddings.weight).to(dtype)
            + F.embedding(batch.positions, self.position_embeddings.weight).to(dtype)
            + self.token_type_embeddings.weight[0].to(dtype)
        )
        return kernels.dropout(self.LayerNorm(x_MD), self.dropout, dropout_keys, _EMBEDDINGS)


class SelfAttention(nn.Module):
    """Multi-head attention over the whole segment, before its output projection."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_dim = config.head_dim
        self.query = Linear(width, width, bias=True)
        self.key = Linear(width, width, bias=True)
        self.value = Linear(width, width, bias=True)

    def forward(
        self, x_MD: Tensor, batch: TokenBatch, dropout_keys: Tensor | None, chosen: Chosen | None
    ) -> Tensor:
        flat: Sequence[Tensor]
        if chosen is None:
            flat = linear_group((self.query, self.key, self.value), x_MD, dropout_keys)
            queries = None
        else:
            key_MD, value_MD = linear_group((self.key, self.value), x_MD, dropout_keys)
            flat = (
                self.query(x_MD[chosen.rows], _rows_of(dropout_keys, chosen)),
                key_MD,
                value_MD,
            )
            queries = chosen.segments
        q_MNH, k_MNH, v_MNH = (x.unflatten(1, (-1, self.head_dim)) for x in flat)
        return attend(q_MNH, k_MNH, v_MNH, batch.segments, queries=queries, causal=False).flatten(1)


class Output(nn.Module):
    """What ends each half of a layer: norm(residual + dropout(dense(x)))."""

    def __init__(self, config: EncoderConfig, in_features: int, site: int) -> None:
        super().__init__()
        self.dense = Linear(in_features, config.hidden_size, bias=True)
        self.LayerNorm = LayerNorm(config)
        self.dropout, self.site = config.hidden_dropout_prob, site

    def forward(
        self, x: Tensor, residual_MD: Tensor, dropout_keys: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The normalised rows, and the sum that was normalised: both [M, D]."""
        added_MD = kernels.dropout(
            self.dense(x, dropout_keys), self.dropout, dropout_keys, self.site
        )
        sum_MD = residual_MD + added_MD
        return self.LayerNorm(sum_MD), sum_MD


class Attention(nn.Module):
    def __init__(self, config: EncoderConfig, site: int) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Output(config, config.hidden_size, site)


class Intermediate(nn.Module):
    """dense(x), before the exact gelu, x Phi(x) (Hendrycks and Gimpel, arXiv 1606.08415)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x_MD: Tensor, dropout_keys: Tensor | None) -> Tensor:
        return self.dense(x_MD, dropout_keys)


class Layer(nn.Module):
    """Attention, then the feed-forward network, each normalised after its residual sum."""

    def __init__(self, config: EncoderConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, _LAYERS + 2 * layer)
        self.intermediate = Intermediate(config)
        self.output = Output(config, config.intermediate_size, _LAYERS + 2 * layer + 1)

    def forward(
        self,
        x_MD: Tensor,
        batch: TokenBatch,
        dropout_keys: Tensor | None,
        chosen: Chosen | None,
        *,
        selective: bool = False,
    ) -> Tensor:
        """x_MD: [M, D] -> [M, D], or [n, D] of the chosen tokens alone.

        selective: what the inner norm and gelu give is not kept but made again (`Activations`).
        """
        attended = self.attention.self(x_MD, batch, dropout_keys, chosen)
        if chosen is not None:
            x_MD, dropout_keys = x_MD[chosen.rows], _rows_of(dropout_keys, chosen)
        x_MD, sum_MD = self.attention.output(attended, x_MD, dropout_keys)
        norm = self.attention.output.LayerNorm
        with made_again(x_MD, lambda rows: norm(sum_MD[rows]), selective=selective):
            inner_MF = self.intermediate(x_MD, dropout_keys)
        h_MF = F.gelu(inner_MF)
        with made_again(h_MF, lambda rows: F.gelu(inner_MF[rows]), selective=selective):
            return self.output(h_MF, x_MD, dropout_keys)[0]


class Layers(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))


class Pooler(nn.Module):
    """tanh(dense(x)) of the rows of [CLS]."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=True)

    def forward(self, x_nD: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        return self.dense(x_nD, dropout_keys).tanh()


class Encoder(nn.Module):
    """Embeddings, layers and pooler: transformers' BertModel."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Layers(config)
        self.pooler = Pooler(config)

    @property
    def word_embedding(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    @property
    def blocks(self) -> nn.ModuleList:
        return self.encoder.layer

    def forward(
        self,
        batch: TokenBatch,
        *,
        dropout_seed: int | None = None,
        activations: Activations = "save",
        compute_dtype: torch.dtype | None = None,
        pool: bool = False,
    ) -> Tensor:
        """Hidden rows [M, D] after the last layer, in `compute_dtype`; with `pool` [n, D].

        Args:
            dropout_seed: switches dropout on, the network's own and the adapters'; one number per
                optimiser step.
            activations: what layers keep for the backward pass. Same numbers, less memory.
            compute_dtype: of all activations. Default: that of the embedding.
            pool: of each segment the first token's row alone, after the pooler. The last layer
                then computes no other query or feed-forward row: the same numbers for less.
        """
        dtype = compute_dtype or self.word_embedding.weight.dtype
        dropout_keys = None
        if dropout_seed is not None:
            dropout_keys = kernels.row_keys(dropout_seed, batch.sample_ids, batch.positions)
        x_MD = self.embeddings(batch, dtype, dropout_keys)
        chosen = batch.segments.beginnings() if pool else None
        for i, layer in enumerate(self.blocks, start=1):
            of_layer = chosen if i == len(self.blocks) else None
            x_MD = run_block(layer, activations, x_MD, batch, dropout_keys, of_layer)
        return x_MD if chosen is None else self.pooler(x_MD, _rows_of(dropout_keys, chosen))


class EncoderClassifier(Classifier):
    """The encoder with a linear head on [CLS]: transformers' BertForSequenceClassification."""

    head_name = "classifier"

    def __init__(self, config: EncoderConfig, num_labels: int) -> None:
        super().__init__()
        self.config = config
        self.bert = Encoder(config)
        self.classifier = nn.Linear(config.hidden_size, num_labels)

    @property
    def network(self) -> Encoder:
        return self.bert

    def scores(
        self,
        batch: TokenBatch,
        *,
        dropout_seed: int | None = None,
        activations: Activations = "save",
        compute_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Logits [n, C] of every note, float32 or wider."""
        pooled_nD = self.bert(
            batch,
            dropout_seed=dropout_seed,
            activations=activations,
            compute_dtype=compute_dtype,
            pool=True,
        )
        if dropout_seed is not None:
            rows = batch.segments.beginnings().rows
            keys = kernels.row_keys(dropout_seed, batch.sample_ids[rows], batch.positions[rows])
            p = self.bert.config.head_dropout
            pooled_nD = kernels.dropout(pooled_nD, p, keys, _CLASSIFIER)
        return self.head_logits(pooled_nD)


def _rows_of(dropout_keys: Tensor | None, chosen: Chosen) -> Tensor | None:
    return None if dropout_keys is None else dropout_keys[chosen.rows]
