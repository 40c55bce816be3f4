"""What stands on a network: the language-model head, and the classifiers of whole notes.

Letters: M tokens of the stream, K supervised tokens, D width, V vocabulary, n segments (notes),
C classes. A head's forward pass returns its loss as a sum and a denominator, because a step's loss
is the sum over all micro-batches and ranks divided by their common denominator. The invariant:
each note is scored on its own rows, and no tensor of all M x V logits exists in training.
"""

import abc
from collections.abc import Iterator
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from model.activations import Activations
from model.batch import Segments, TokenBatch
from model.config import DecoderConfig, EncoderConfig
from model.decoder import Decoder
from model.experts import load_balancing_loss

IGNORE = -100  # the label of a token that is not scored, as in Hugging Face


class Loss(NamedTuple):
    loss_sum: Tensor  # scalar, float32 or wider
    denominator: float  # what the sum is divided by, together with the other micro-batches'
    aux: dict[str, Tensor]  # further terms of a network's own by name, each as a mean

    @property
    def total(self) -> Tensor:
        """What training descends, as a sum: each term of `aux` weighs as the denominator does."""
        terms = [self.denominator * term for term in self.aux.values()]
        return sum(terms, start=self.loss_sum)


def supervised_tokens(
    labels: Tensor, segments: Segments, *, first: bool = False
) -> tuple[Tensor, Tensor]:
    """Which tokens are scored: their places in the stream, and what has to be predicted there.

    The row that predicts a token is the one before it in its segment. A segment's first token has
    none, and is never scored, unless virtual tokens stand in front of it (`first`).

    Args:
        labels: [M] int64, each token's own id where it is scored and IGNORE elsewhere.

    Returns:
        places [K] int64, targets [K] int64.
    """
    is_scored_M = labels != IGNORE
    if not first:
        is_scored_M[torch.tensor(segments.offsets[:-1], device=labels.device)] = False
    scored_K = is_scored_M.nonzero().squeeze(1)
    return scored_K, labels[scored_K]


class CausalLM(nn.Module):
    """The decoder with a language-model head, its own or the embedding's matrix (tied)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            # Not a `model.linear.Linear`: the loss reads the weight alone, so an adapter attached
            # here would be passed over in silence.
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def network(self) -> Decoder:
        return self.model

    @property
    def head_weight(self) -> Tensor:
        """[V, D]."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def forward(
        self,
        batch: TokenBatch,
        labels: Tensor,
        *,
        dropout_seed: int | None = None,
        activations: Activations = "save",
        compute_dtype: torch.dtype | None = None,
    ) -> Loss:
        """Cross-entropy of every scored token, summed; in `aux` the experts' load balancing.

        Args:
            labels: [M] int64 as in `supervised_tokens`; left on the host, nothing waits for a GPU.
        """
        device, has_virtual = batch.input_ids.device, self.model.virtual_tokens > 0
        tokens, targets = supervised_tokens(labels, batch.segments, first=has_virtual)
        router_logits: list[Tensor] = []
        hidden_KD = self.model(
            batch,
            predicting=tokens.to(device, non_blocking=True),
            dropout_seed=dropout_seed,
            activations=activations,
            compute_dtype=compute_dtype,
            router_logits=router_logits,
        )
        targets = targets.to(device, non_blocking=True)
        loss_sum = kernels.linear_cross_entropy(hidden_KD, self.head_weight, targets)
        aux: dict[str, Tensor] = {}
        if self.config.router_aux_loss_coef:
            balance = load_balancing_loss(router_logits, self.config.num_experts_per_tok)
            aux["router"] = self.config.router_aux_loss_coef * balance
        return Loss(loss_sum, float(len(tokens)), aux)

    def logits(self, batch: TokenBatch) -> Tensor:
        """Logits [M, V] of every token, for small batches."""
        return self.head_logits(self.model(batch))

    def head_logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, V] of chosen hidden rows [rows, D]."""
        return F.linear(hidden, self.head_weight.to(hidden.dtype))


class Network(Protocol):
    """What training asks of a decoder or an encoder, besides its forward pass."""

    @property
    def word_embedding(self) -> nn.Embedding: ...

    @property
    def blocks(self) -> nn.ModuleList: ...

    def modules(self) -> Iterator[nn.Module]: ...


class Classifier(nn.Module, abc.ABC):
    """A network with a linear head on one row of each note, which has seen all of it."""

    config: DecoderConfig | EncoderConfig
    head_name: ClassVar[str]  # the head's name in the model and in checkpoints

    @property
    @abc.abstractmethod
    def network(self) -> Network:
        """What the head stands on."""

    @property
    def head(self) -> nn.Linear:
        head = getattr(self, self.head_name)
        assert isinstance(head, nn.Linear)
        return head

    def head_state(self) -> dict[str, Tensor]:
        """The head's tensors (not copies) under their names in the model."""
        return {f"{self.head_name}.{key}": x.detach() for key, x in self.head.named_parameters()}

    def forward(
        self,
        batch: TokenBatch,
        labels: Tensor,
        *,
        class_weights: Tensor | None = None,
        dropout_seed: int | None = None,
        activations: Activations = "save",
        compute_dtype: torch.dtype | None = None,
    ) -> Loss:
        """Cross-entropy of each note's class, or binary cross-entropy of each of its labels.

        Args:
            labels: [n] int64, one class a note; or [n, C] floats in 0 to 1, several labels a note.
                On the host, as are the class weights.
            class_weights: [C], the weight of a note by its class; for one class a note only.
        """
        scores_nC = self.scores(
            batch,
            dropout_seed=dropout_seed,
            activations=activations,
            compute_dtype=compute_dtype,
        )
        denominator = self.denominator(labels, class_weights)
        targets = labels.to(scores_nC.device, non_blocking=True)
        if labels.is_floating_point():
            loss_sum = F.binary_cross_entropy_with_logits(
                scores_nC, targets.to(scores_nC.dtype), reduction="sum"
            )
        else:
            weights = None if class_weights is None else class_weights.to(scores_nC)
            loss_sum = F.cross_entropy(scores_nC, targets, weight=weights, reduction="sum")
        return Loss(loss_sum, denominator, {})

    @abc.abstractmethod
    def scores(
        self,
        batch: TokenBatch,
        *,
        dropout_seed: int | None = None,
        activations: Activations = "save",
        compute_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Logits [n, C] of every note, float32 or wider."""

    def head_logits(self, hidden_nD: Tensor) -> Tensor:
        """Logits [n, C] of chosen hidden rows [n, D], float32 or wider."""
        wide = torch.promote_types(hidden_nD.dtype, torch.float32)
        bias = None if self.head.bias is None else self.head.bias.to(wide)
        return F.linear(hidden_nD.to(wide), self.head.weight.to(wide), bias)

    @staticmethod
    def denominator(labels: Tensor, class_weights: Tensor | None = None) -> float:
        """Sum of the notes' class weights (the number of notes without), or notes x labels."""
        if labels.is_floating_point() or class_weights is None:
            return float(labels.numel())
        return float(class_weights.double()[labels].sum())


class SequenceClassifier(Classifier):
    """The decoder with a linear head on the last token of each note."""

    head_name = "score"

    def __init__(self, config: DecoderConfig, num_labels: int) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.score = nn.Linear(config.hidden_size, num_labels, bias=False)

    @property
    def network(self) -> Decoder:
        return self.model

    def scores(
        self,
        batch: TokenBatch,
        *,
        dropout_seed: int | None = None,
        activations: Activations = "save",
        compute_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Logits [n, C] of every note, float32 or wider."""
        last_nD = self.model(
            batch,
            dropout_seed=dropout_seed,
            activations=activations,
            compute_dtype=compute_dtype,
            pool=True,
        )
        return self.head_logits(last_nD)


Model = CausalLM | Classifier
