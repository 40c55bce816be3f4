"""BERT checkpoints in and out: transformers' own files, older spellings, conversion, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
)

from model.checkpoint import (
    check_checkpoint,
    load_causal_lm,
    load_classifier,
    save_model,
    stored_dtype,
)
from model.config import EncoderConfig, read_config, write_config
from model.convert import convert
from model.encoder import EncoderClassifier
from tests.model.bert import (
    hugging_face_twin,
    make_classifier,
    make_config,
    make_notes,
    one_by_one,
)
from tests.model.oracle import relative_error


def with_head_of(model: EncoderClassifier, twin: BertForSequenceClassification) -> None:
    for name, tensor in model.head_state().items():
        tensor.copy_(twin.state_dict()[name])


def encoders(kind: type[PreTrainedModel], twin: BertForSequenceClassification) -> PreTrainedModel:
    """Another of transformers' models with the encoder of the twin."""
    other = kind(twin.config)
    encoder = other if kind is BertModel else other.bert
    encoder.load_state_dict(twin.bert.state_dict())
    return other


def test_a_saved_classifier_is_transformers_and_comes_back(tmp_path: Path) -> None:
    ours = make_classifier().float()
    save_model(ours, tmp_path / "ours", label_names=("home", "ward", "ICU"))
    theirs = BertForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    assert theirs.config.id2label == {0: "home", 1: "ward", 2: "ICU"}
    assert theirs.config.architectures == ["BertForSequenceClassification"]
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_classifier(tmp_path / "theirs", 3)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
    assert again.config == ours.config == read_config(tmp_path / "ours")
    save_model(again, tmp_path / "again", label_names=("home", "ward", "ICU"))
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("ours", "again")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


@pytest.mark.parametrize("kind", [BertModel, BertForPreTraining])
def test_a_base_of_transformers_gets_a_fresh_head(
    kind: type[PreTrainedModel], tmp_path: Path
) -> None:
    twin = hugging_face_twin(make_classifier().float())
    encoders(kind, twin).save_pretrained(tmp_path)
    model = load_classifier(tmp_path, 3, seed=4)
    assert isinstance(model, EncoderClassifier)
    assert not model.classifier.bias.any() and model.classifier.weight.std() < 0.1
    assert torch.equal(model.classifier.weight, load_classifier(tmp_path, 3, seed=4).head.weight)
    assert not torch.equal(model.classifier.weight, load_classifier(tmp_path, 3).head.weight)
    with_head_of(model, twin)
    batch = make_notes()
    assert relative_error(model.scores(batch), one_by_one(twin, batch)) < 1e-5
    check_checkpoint(tmp_path)
    assert stored_dtype(tmp_path) == torch.float32


def old_names(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """As files before transformers 4 have them."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("bert.")
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        renamed[prefix + name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor.contiguous()
    renamed[f"{prefix}embeddings.position_ids"] = torch.arange(64)[None]
    return renamed


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_an_old_pickle_is_converted_and_read(prefix: str, tmp_path: Path) -> None:
    """gamma and beta, position_ids, the heads of pretraining, and a config.json of that time."""
    ours = make_classifier().float()
    source = tmp_path / "old"
    source.mkdir()
    bert = {k: v for k, v in ours.state_dict().items() if not k.startswith("classifier")}
    tensors = old_names(bert, prefix) | {
        "cls.predictions.bias": torch.zeros(97),
        "cls.predictions.decoder.weight": ours.bert.word_embedding.weight.detach(),
        "cls.predictions.transform.LayerNorm.gamma": torch.ones(32),
        "cls.seq_relationship.weight": torch.zeros(2, 32),
    }
    torch.save(tensors, source / "pytorch_model.bin")
    config = {
        "attention_probs_dropout_prob": 0.1,
        "directionality": "bidi",
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 56,
        "max_position_embeddings": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "pooler_fc_size": 768,
        "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform",
        "type_vocab_size": 2,
        "vocab_size": 97,
    }
    (source / "config.json").write_text(json.dumps(config))
    (source / "vocab.txt").write_text("[PAD]\n")
    said = convert(source, tmp_path / "new")
    assert said[-1] == "copied vocab.txt"
    assert not any("cls." in name for name in load_file(tmp_path / "new" / "model.safetensors"))
    model = load_classifier(tmp_path / "new", 3)
    for name, tensor in bert.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_config_round_trip_and_defaults(tmp_path: Path) -> None:
    config = make_config(classifier_dropout=0.3, layer_norm_eps=1e-6, pad_token_id=5)
    write_config(config, tmp_path, head="SequenceClassification")
    assert read_config(tmp_path) == config
    sizes = {
        name: getattr(config, name)
        for name in EncoderConfig.__dataclass_fields__
        if "_size" in name or name.startswith(("num_", "max_"))
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes))  # Google's: no model_type
    assert read_config(tmp_path) == make_config()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; this network has 'gelu' only"),
        ({"position_embedding_type": "relative_key"}, "this network has 'absolute' only"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"hidden_size": 33}, "not a multiple of num_attention_heads"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob is 1.0"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"layer_norm_eps": 0}, "layer_norm_eps is 0.0; it is a positive number"),
        ({"embedding_size": 128}, "'embedding_size' is unknown"),
        ({"model_type": "roberta"}, "known are llama.* and bert"),
    ],
    ids=str,
)
def test_what_the_encoder_does_not_honour_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_config(make_config(), tmp_path, head="SequenceClassification")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("bert.pooler.dense.bias"), "lacks tensors .*bert.pooler.dense.bias"),
        (lambda x: x.update({"qa_outputs.bias": torch.zeros(2)}), "rules out: qa_outputs.bias"),
        (
            lambda x: x.update({"embeddings.LayerNorm.gamma": torch.zeros(32)}),
            "is the same tensor",
        ),
        (lambda x: x.pop("classifier.bias"), "lacks tensors .*classifier.bias"),
    ],
    ids=["no pooler", "another head", "twice", "half a head"],
)
def test_a_checkpoint_that_is_not_the_encoder_s_is_refused(
    change: Any, message: str, tmp_path: Path
) -> None:
    save_model(make_classifier().float(), tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_classifier(tmp_path / "base", 3)


def test_an_encoder_is_no_language_model(tmp_path: Path) -> None:
    save_model(make_classifier().float(), tmp_path / "base")
    with pytest.raises(ValueError, match="is an encoder"):
        load_causal_lm(tmp_path / "base")
