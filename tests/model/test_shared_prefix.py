"""Tokens read once give what they give in front of each sequence."""

import pytest
import torch

from model.batch import TokenBatch
from model.generation import GenerationConfig, generate
from model.shared_prefix import can_share, shared_prefix
from tests.model.oracle import CONFIGS, make_causal_lm
from tests.model.test_seams import add_prefix, add_virtual_tokens, make_model, packed

FRONT = [1, 5, 9, 44, 80, 3]
BEHIND = [[12, 7, 7, 31], [2], [60, 61, 62, 63, 64, 65, 66, 67], [7, 7]]


def joined(pieces: list[list[int]]) -> TokenBatch:
    return packed([torch.tensor(piece) for piece in pieces])


@torch.no_grad()
@pytest.mark.parametrize("name", [*CONFIGS, "with an adapter's prefix"])
def test_rows_and_text_are_those_behind_the_tokens_themselves(name: str) -> None:
    if name in CONFIGS:
        model = make_causal_lm(CONFIGS[name]).double()
    else:
        model = make_model()
        add_prefix(model)
        model.double()
    if not can_share(model.model, len(FRONT)):
        assert name == "mistral-window-of-two"
        return
    config = GenerationConfig(max_new_tokens=9, temperature=2.0)
    whole = [FRONT + piece for piece in BEHIND]
    rows = torch.split(model.model(joined(whole)), [len(ids) for ids in whole])
    text = generate(model, whole, config)
    with shared_prefix(model.model, FRONT):
        found = torch.split(model.model(joined(BEHIND)), [len(ids) for ids in BEHIND])
        assert generate(model, BEHIND, config) == text
    for one, other in zip(found, rows, strict=True):
        torch.testing.assert_close(one, other[len(FRONT) :], rtol=0, atol=1e-9)
    assert generate(model, whole, config) == text
    if name in CONFIGS:
        assert not model.model.prefixes


def test_nothing_is_shared_behind_virtual_tokens_or_beyond_a_window() -> None:
    model = make_model()
    assert can_share(model.model, 100)
    add_virtual_tokens(model)
    assert not can_share(model.model, 1)
    windowed = make_causal_lm(CONFIGS["mistral-window"])
    assert can_share(windowed.model, 9)
    assert not can_share(windowed.model, 10)
