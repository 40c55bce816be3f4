"""What a stage optimises: how a packed batch becomes a summed loss and its denominator.

The loop knows nothing of language modelling or classification; it asks an objective for the
denominator of every micro-batch of a step, and then for their summed losses one by one. Invariant:
`denominator` is a number of the host that needs no forward pass and equals `loss(...).denominator`.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from data.packing import IGNORED, PackedBatch
from model.activations import Activations
from model.batch import TokenBatch
from model.heads import CausalLM, Classifier, Loss, Model


class Objective(Protocol):
    """A model and the loss it is trained with."""

    @property
    def model(self) -> nn.Module: ...

    def denominator(self, batch: PackedBatch) -> float:
        """The weight of a micro-batch: scored tokens, summed class weights, or rows x labels."""
        ...

    def loss(self, batch: PackedBatch, *, dropout_seed: int | None) -> Loss:
        """Forward pass; `dropout_seed` is None in validation."""
        ...


class LanguageModelling:
    """Cross-entropy of every next token inside its segment."""

    def __init__(
        self, model: CausalLM, device: torch.device, *, activations: Activations = "save"
    ) -> None:
        self.model = model
        self._device = device
        self._compute_dtype = compute_dtype(model, device)
        self._activations: Activations = activations

    def denominator(self, batch: PackedBatch) -> float:
        assert batch.labels is not None
        return float(np.count_nonzero(batch.labels != IGNORED))

    def loss(self, batch: PackedBatch, *, dropout_seed: int | None) -> Loss:
        return self.model(
            to_device(batch, self._device),
            torch.from_numpy(batch.labels),  # stays on the host, where its rows are counted
            dropout_seed=dropout_seed,
            activations=self._activations,
            compute_dtype=self._compute_dtype,
        )


class Classification:
    """Cross-entropy of each note's class; each class weighs `class_weights`, or 1."""

    def __init__(
        self,
        model: Classifier,
        device: torch.device,
        *,
        class_weights: np.ndarray | None = None,
        activations: Activations = "save",
    ) -> None:
        self.model = model
        self._device = device
        self._compute_dtype = compute_dtype(model, device)
        self._activations: Activations = activations
        self._class_weights = class_weights

    def denominator(self, batch: PackedBatch) -> float:
        assert batch.targets is not None
        if batch.targets.ndim == 2:
            return float(batch.targets.size)
        if self._class_weights is None:
            return float(len(batch.targets))
        return float(self._class_weights[batch.targets].sum())

    def loss(self, batch: PackedBatch, *, dropout_seed: int | None) -> Loss:
        weights = self._class_weights
        return self.model(
            to_device(batch, self._device),
            torch.from_numpy(batch.targets),
            class_weights=None if weights is None else torch.from_numpy(weights),
            dropout_seed=dropout_seed,
            activations=self._activations,
            compute_dtype=self._compute_dtype,
        )

    def scores(self, batch: PackedBatch) -> Tensor:
        """Logits [n, C] of the notes of a batch, which may lack labels."""
        tokens = to_device(batch, self._device)
        return self.model.scores(tokens, compute_dtype=self._compute_dtype)


def compute_dtype(model: Model, device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that has it; elsewhere float32, or wider if the base is."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.promote_types(model.network.word_embedding.weight.dtype, torch.float32)


def to_device(batch: PackedBatch, device: torch.device) -> TokenBatch:
    """The tokens of a packed batch, on the device."""
    offsets = batch.offsets.tolist()
    return TokenBatch.from_arrays(batch.input_ids, offsets, batch.sample_ids).to(device)


def balanced_class_weights(counts: np.ndarray) -> np.ndarray:
    """N / (K count_c) for each of K classes with count_c of N notes; float64 [K].

    Raises ValueError for a class without notes, which could never be learned.
    """
    if (counts == 0).any():
        raise ValueError(
            f"{int((counts == 0).sum())} of {len(counts)} classes without a note in the training "
            "part; leave out what notes they have, or split the data differently"
        )
    return counts.sum() / (len(counts) * counts)
