"""Faults that train, print a loss and are wrong: each has a test that its planting fails."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from data.loader import Loader
from data.notes import Note
from data.packing import ClassificationNotes, LanguagePieces
from lora.attach import attach, set_trainable
from lora.config import LoraConfig
from lora.peft_format import load_adapter, save_adapter
from model.batch import TokenBatch
from model.checkpoint import load_causal_lm
from model.config import DecoderConfig
from model.decoder import init_weights
from model.files import write_safetensors
from model.heads import CausalLM, SequenceClassifier
from tests.data.conftest import make_cache  # noqa: F401 (fixture)
from training.config import OptimSettings
from training.objective import LanguageModelling
from training.optim import make_adamw
from training.parallel import Ranks
from training.step import optimiser_step

BOS, EOS = 1, 2
NOTES = [Note("abcdefgh"), Note("hgf"), Note("acegacegaceg"), Note("b")]
CPU = torch.device("cpu")


def shape() -> DecoderConfig:
    return DecoderConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        bos_token_id=BOS,
        eos_token_ids=(EOS,),
        pad_token_id=EOS,
    )


def make_model(labels: int = 0) -> CausalLM | SequenceClassifier:
    model = SequenceClassifier(shape(), labels) if labels else CausalLM(shape())
    init_weights(model, 0.2, seed=0)
    return model.requires_grad_(False)


def batch_of(notes: Sequence[Sequence[int]]) -> TokenBatch:
    offsets = [0, *np.cumsum([len(note) for note in notes]).tolist()]
    ids = np.concatenate([np.array(note, np.int64) for note in notes])
    return TokenBatch.from_arrays(ids, offsets, np.arange(len(notes)))


def all_pieces(make_cache, max_length: int = 64) -> LanguagePieces:  # type: ignore[no-untyped-def] # noqa: F811
    cache = make_cache(NOTES)
    rows = np.arange(len(NOTES), dtype=np.uint32)
    return LanguagePieces(cache, rows, max_length=max_length, bos_id=BOS, eos_id=EOS)


def test_wrong_key_prefix(tmp_path: Path) -> None:
    model = make_model()
    attach(model, "clinical", LoraConfig(r=2), seed=0)
    save_adapter(model, "clinical", tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    names = {name: tensor.clone() for name, tensor in load_file(path).items()}
    assert all(name.startswith("base_model.model.model.layers.") for name in names)
    for wrong in ("model.", "base_model.", "base_model.model.model.model."):
        fixed = {name.replace("base_model.model.", wrong): t for name, t in names.items()}
        write_safetensors(path, fixed)
        with pytest.raises(ValueError, match=r"does not (begin|match)"):
            load_adapter(make_model(), tmp_path / "a", "clinical")


def test_head_lost_on_save(tmp_path: Path) -> None:
    model = make_model(labels=3)
    attach(model, "downstream", LoraConfig(r=2), seed=0)
    head = {"score.weight": torch.randn(3, 32)}
    model.score.weight.data.copy_(head["score.weight"])
    save_adapter(model, "downstream", tmp_path / "a", head=head)
    other = make_model(labels=3)
    load_adapter(other, tmp_path / "a", "downstream")
    assert torch.equal(other.score.weight, head["score.weight"])


def test_other_adapter_frozen_by_activation() -> None:
    model = make_model(labels=2)
    for name in ("clinical", "downstream"):
        attach(model, name, LoraConfig(r=2), seed=0)
        set_trainable(model, name, True)
    batch = batch_of([[BOS, 5, 6], [BOS, 7]])
    model(batch, torch.tensor([0, 1])).loss_sum.backward()
    for name in ("clinical", "downstream"):
        grads = [p.grad for key, p in model.named_parameters() if f".{name}.lora_B" in key]
        assert grads and all(grad is not None and grad.any() for grad in grads)


def test_gradient_checkpointing_over_frozen_embeddings() -> None:
    found = []
    for activations in ("save", "checkpoint"):
        model = make_model()
        attach(model, "clinical", LoraConfig(r=2), seed=0)
        batch = batch_of([[BOS, 5, 6, 7, EOS]])
        labels = batch.input_ids.clone()
        model(batch, labels, activations=activations).loss_sum.backward()
        found.append({k: p.grad for k, p in model.named_parameters() if "lora_B" in k})
    for key, grad in found[0].items():
        assert grad is not None and grad.any()
        torch.testing.assert_close(found[1][key], grad, rtol=0, atol=1e-6)


def test_accumulation_weighting(make_cache) -> None:  # type: ignore[no-untyped-def] # noqa: F811
    """Notes of unlike lengths weigh by their tokens, in one micro-batch or in four."""
    found = []
    for micro_tokens in (64, 14):
        model = make_model()
        attach(model, "clinical", LoraConfig(r=2), seed=0)
        trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
        pieces = all_pieces(make_cache, max_length=14)
        loader = Loader(pieces, batch_size=len(pieces), micro_tokens=micro_tokens, seed=0)
        micro_batches = loader.next_step()
        optimiser_step(
            LanguageModelling(model, CPU),
            trained,
            make_adamw(trained, OptimSettings()),
            micro_batches,
            Ranks(0, 1, CPU),
            dropout_seed=0,
            rate=1e-2,
            clip=None,
        )
        found.append((len(micro_batches), {k: p.detach().clone() for k, p in trained.items()}))
    assert found[0][0] == 1 and found[1][0] > 2
    for key, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], value, rtol=0, atol=1e-4)


def test_pooling_beside_padding_and_end_tokens() -> None:
    """A note's score is its own, whatever stands beside it and though it ends in pad = EOS."""
    model = make_model(labels=2)
    notes = [[BOS, 9, EOS, EOS], [BOS], [BOS, 5, 6, 7, 8, 9, 10], [EOS, EOS, BOS, 4]]
    together = model.scores(batch_of(notes))
    for i, note in enumerate(notes):
        torch.testing.assert_close(
            together[i], model.scores(batch_of([note]))[0], rtol=0, atol=1e-6
        )
    assert not torch.allclose(together[0], model.scores(batch_of([notes[0][:-1]]))[0])


def test_eos_without_a_label_and_bos_once(make_cache) -> None:  # type: ignore[no-untyped-def] # noqa: F811
    """Cut anywhere: one BOS in front of a note, one EOS behind it, every token scored once."""
    for max_length in (3, 5, 64):
        pieces = all_pieces(make_cache, max_length)
        batch = pieces.batch(np.arange(len(pieces)))
        for row, note in enumerate(NOTES):
            of = np.repeat(batch.rows, np.diff(batch.offsets)) == row
            ids, labels = batch.input_ids[of], batch.labels[of]
            assert ids[0] == BOS and (ids == BOS).sum() == 1
            assert labels[labels != -100].tolist() == [*map(ord, note.text), EOS]


def test_silent_truncation(make_cache) -> None:  # type: ignore[no-untyped-def] # noqa: F811
    cache, rows = make_cache(NOTES), np.arange(len(NOTES), dtype=np.uint32)
    notes = ClassificationNotes(cache, rows, max_length=8, bos_id=BOS)
    assert notes.truncated == 2 and all_pieces(make_cache, 8).notes_cut == 2
    assert ClassificationNotes(cache, rows, max_length=13, bos_id=BOS).truncated == 0


def test_data_position_after_resume(make_cache) -> None:  # type: ignore[no-untyped-def] # noqa: F811
    def loader() -> Loader:
        return Loader(all_pieces(make_cache, 4), batch_size=2, micro_tokens=64, seed=3)

    whole, broken = loader(), loader()
    seen = [np.concatenate([b.sample_ids for b in whole.next_step()]).tolist() for _ in range(20)]
    for _ in range(7):
        broken.next_step()
    resumed = loader()
    resumed.load_state(broken.state())
    rest = [np.concatenate([b.sample_ids for b in resumed.next_step()]).tolist() for _ in range(13)]
    assert rest == seen[7:]


def test_overwriting_a_mapped_file(tmp_path: Path) -> None:
    """Weights that were read are still themselves after their file was written over."""
    from model.checkpoint import save_model

    save_model(make_model(), tmp_path / "base")
    model = load_causal_lm(tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = tmp_path / "base" / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))  # in place, as a mapped file would show it
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    write_safetensors(path, model.state_dict())
    with safe_open(path, framework="pt") as file:
        assert all(torch.equal(file.get_tensor(name), before[name]) for name in before)
