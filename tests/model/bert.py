"""transformers' BERT with the weights of one of our classifiers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from model.batch import TokenBatch
from model.config import EncoderConfig
from model.encoder import EncoderClassifier, LayerNorm

NUM_LABELS = 3


def make_config(**changes: Any) -> EncoderConfig:
    fields: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    return EncoderConfig(**fields | changes)


def make_classifier(
    config: EncoderConfig | None = None, num_labels: int = NUM_LABELS, seed: int = 0
) -> EncoderClassifier:
    """float64, with weights and biases large enough that every part of the network matters."""
    model = EncoderClassifier(config or make_config(), num_labels).double()
    generator = torch.Generator().manual_seed(seed)
    norms = {id(m.weight) for m in model.modules() if isinstance(m, LayerNorm)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
            if id(parameter) in norms:
                parameter.add_(1.0)
    return model


def hugging_face_twin(ours: EncoderClassifier) -> BertForSequenceClassification:
    """transformers' model with the same weights, under the same names, in the same dtype."""
    config = ours.bert.config
    twin = BertForSequenceClassification(
        BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            max_position_embeddings=config.max_position_embeddings,
            type_vocab_size=config.type_vocab_size,
            layer_norm_eps=config.layer_norm_eps,
            num_labels=ours.classifier.out_features,
        )
    )
    twin.to(ours.classifier.weight.dtype).load_state_dict(ours.state_dict())
    return twin.eval()


def make_notes(seed: int = 2, lengths: tuple[int, ...] = (3, 17, 1, 30, 29)) -> TokenBatch:
    """Notes of unlike lengths; id 0, which transformers pads with, is a token like any other."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return TokenBatch.from_arrays(torch.randint(97, (sum(lengths),), generator=generator), offsets)


def one_by_one(twin: torch.nn.Module, batch: TokenBatch) -> Tensor:
    """Logits [n, C] of an oracle that sees every note alone."""
    notes = batch.input_ids.split(batch.segments.lengths)
    return torch.cat([twin(input_ids=note[None]).logits for note in notes])


def padding_trains(twin: BertForSequenceClassification) -> None:
    """transformers gives the embedding of its padding token no gradient; here id 0 is a token."""
    twin.bert.embeddings.word_embeddings.padding_idx = None


def write_vocabulary(folder: Path, words: list[str], *, lowercase: bool = True) -> None:
    """vocab.txt and tokenizer_config.json as a BERT's folder has them."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    setting = "true" if lowercase else "false"
    (folder / "tokenizer_config.json").write_text(f'{{"do_lower_case": {setting}}}\n')
