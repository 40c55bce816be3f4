"""Attention over packed segments against torch's, one segment at a time."""

import itertools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import model.attention
from model.attention import attend
from model.batch import Segments, TokenBatch

LENGTHS = (
    [5],
    [1, 1, 1],
    [7, 7, 7],  # one group, a view of the stream
    [15, 16, 16, 3, 31],  # near lengths padded together, others alone
    [8, 7, 1, 9, 8],
)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
def test_packed_attention_is_each_segments_own(lengths: list[int], heads: tuple[int, int]) -> None:
    offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(offsets[-1], n, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for n in (heads[0], heads[1], heads[1])
    )
    truth = []
    for start, stop in itertools.pairwise(offsets):
        one = [x[start:stop].transpose(0, 1)[None] for x in (q, k, v)]
        out = scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)
        truth.append(out[0].transpose(0, 1))
    ours = attend(q, k, v, Segments.from_offsets(offsets))
    torch.testing.assert_close(ours, torch.cat(truth), rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(ours)
    got = torch.autograd.grad(ours, (q, k, v), upstream)
    wanted = torch.autograd.grad(torch.cat(truth), (q, k, v), upstream)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize(
    ("causal", "window"), [(True, None), (False, None), (True, 1), (True, 2), (True, 8), (True, 40)]
)
@pytest.mark.parametrize("asking", ["all", "last", "some"])
def test_other_queries_see_what_their_place_allows(
    lengths: list[int],
    heads: tuple[int, int],
    causal: bool,
    window: int | None,
    asking: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bidirectional, one query a segment, fewer queries than keys, a window: each with a mask."""
    monkeypatch.setattr(model.attention, "WINDOW_BLOCK", 5)  # of which a segment has several
    count_of = {"all": lambda n: n, "last": lambda n: 1, "some": lambda n: (n + 1) // 2}[asking]
    counts = [count_of(length) for length in lengths]
    generator = torch.Generator().manual_seed(0)

    def draw(tokens: int, heads: int) -> torch.Tensor:
        out = torch.randn(tokens, heads, 8, generator=generator, dtype=torch.float64)
        return out.requires_grad_()

    q, k, v = (
        draw(sum(counts), heads[0]),
        draw(sum(lengths), heads[1]),
        draw(sum(lengths), heads[1]),
    )
    truth = []
    parts = (x.split(sizes) for x, sizes in ((q, counts), (k, lengths), (v, lengths)))
    for one_q, one_k, one_v in zip(*parts, strict=True):
        ours_k, ours_v = (x.repeat_interleave(heads[0] // heads[1], 1) for x in (one_k, one_v))
        logits = torch.einsum("tnh,snh->nts", one_q, ours_k) / 8**0.5
        if causal:
            after = torch.ones(logits.shape[1:]).triu(len(one_k) - len(one_q) + 1).bool()
            logits = logits.masked_fill(after, float("-inf"))
        if window is not None:  # transformers: key > query - window
            before = torch.ones(logits.shape[1:]).tril(len(one_k) - len(one_q) - window).bool()
            logits = logits.masked_fill(before, float("-inf"))
        truth.append(torch.einsum("nts,snh->tnh", logits.softmax(-1), ours_v))
    keys = Segments.from_offsets([0, *torch.tensor(lengths).cumsum(0).tolist()])
    queries = Segments.from_offsets([0, *torch.tensor(counts).cumsum(0).tolist()])
    asked = None if asking == "all" else queries
    ours = attend(q, k, v, keys, queries=asked, causal=causal, window=window)
    torch.testing.assert_close(ours, torch.cat(truth), rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(ours)
    got = torch.autograd.grad(ours, (q, k, v), upstream)
    wanted = torch.autograd.grad(torch.cat(truth), (q, k, v), upstream)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_positions_restart_and_samples_follow_their_tokens() -> None:
    batch = TokenBatch.from_arrays([10, 11, 12, 13, 14], [0, 2, 5], [70, 80])
    assert batch.positions.tolist() == [0, 1, 0, 1, 2]
    assert batch.sample_ids.tolist() == [70, 70, 80, 80, 80]
    assert batch.segments.lengths == (2, 3)
