"""The decoder's slots: virtual tokens, prefixes and prompts that are known to be something else.

Virtual tokens with the embeddings of real ones are these tokens; a prefix of the keys and values
that earlier tokens have left is these tokens; a prompt is a second softmax, written out here.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from model.batch import Segments, TokenBatch
from model.cache import KVCache
from model.generation import GenerationConfig, generate
from model.heads import CausalLM, SequenceClassifier
from tests.model.oracle import make_causal_lm, make_config, randomise

FRONT = torch.tensor([7, 3, 90])  # tokens that stand in front of every segment
LENGTHS = (5, 1, 12, 12)


class VirtualTokens(nn.Module):
    """The embeddings of real tokens, as rows of their own."""

    def __init__(self, rows_PD: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows_PD.detach().clone())
        self.virtual_tokens = len(rows_PD)

    def forward(
        self, x_MD: Tensor, batch: TokenBatch, dropout_seed: int | None
    ) -> tuple[Tensor, TokenBatch]:
        batch, behind = batch.behind(self.virtual_tokens)
        return behind.join(self.rows, x_MD), batch


class Prefix(nn.Module):
    def __init__(self, rows_PL2GH: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows_PL2GH.detach().clone())
        self.prefix_tokens = len(rows_PL2GH)

    def forward(self) -> Tensor:
        return self.rows


class Prompt(nn.Module):
    def __init__(self, rows_PD: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows_PD)

    def forward(self, q_MNH: Tensor, k_PGH: Tensor, v_PGH: Tensor) -> Tensor:
        k_PNH, v_PNH = (
            x.repeat_interleave(q_MNH.shape[1] // x.shape[1], 1) for x in (k_PGH, v_PGH)
        )
        scores_MNP = torch.einsum("mnh,pnh->mnp", q_MNH, k_PNH) / q_MNH.shape[2] ** 0.5
        return 0.3 * torch.einsum("mnp,pnh->mnh", scores_MNP.softmax(-1), v_PNH)


def make_segments(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 97, (length,), generator=generator) for length in lengths]


def packed(segments: list[Tensor]) -> TokenBatch:
    offsets = [0]
    for segment in segments:
        offsets.append(offsets[-1] + len(segment))
    return TokenBatch.from_arrays(torch.cat(segments), offsets)


def make_model() -> CausalLM:
    return make_causal_lm(make_config())  # float64, grouped-query


def stored(model: CausalLM, tokens: Tensor) -> Tensor:
    """What the tokens leave in a cache: [P, L, 2, G, H]."""
    cache = KVCache(model.config, 1, len(tokens), dtype=torch.float64, device="cpu")
    model.model(packed([tokens]), cache=cache)
    pairs = zip(cache._keys, cache._values, strict=True)
    return torch.stack([torch.stack(pair, 2)[0] for pair in pairs], 1)


def add_virtual_tokens(model: CausalLM | SequenceClassifier) -> None:
    model.model.input_modules["clinical"] = VirtualTokens(model.model.embed_tokens.weight[FRONT])


def add_prefix(model: CausalLM | SequenceClassifier) -> None:
    causal = CausalLM(model.config).double()
    causal.model.load_state_dict(model.model.state_dict())
    model.model.prefixes["clinical"] = Prefix(stored(causal, FRONT))


def add_prompts(model: CausalLM | SequenceClassifier) -> None:
    for block in model.model.layers:
        rows = torch.randn(4, model.config.hidden_size, dtype=torch.float64)
        block.self_attn.prompts["clinical"] = Prompt(rows)


ADDITIONS = [add_virtual_tokens, add_prefix, add_prompts]


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("add", [add_virtual_tokens, add_prefix])
def test_rows_in_front_are_tokens_in_front(
    add: Callable[[CausalLM | SequenceClassifier], None],
) -> None:
    model, segments = make_model(), make_segments(*LENGTHS)
    whole = packed([torch.cat((FRONT, segment)) for segment in segments])
    labels = whole.input_ids.clone()
    first = torch.tensor([o + i for o in whole.segments.offsets[:-1] for i in range(len(FRONT))])
    labels[first] = -100
    hidden, loss = model.model(whole), model(whole, labels)
    add(model)
    is_own = torch.ones(len(hidden), dtype=torch.bool).index_fill(0, first, False)
    close(model.model(packed(segments)), hidden[is_own])
    if add is add_virtual_tokens:  # the last of which predicts each segment's first token
        found = model(packed(segments), torch.cat(segments))
        close(found.loss_sum, loss.loss_sum)
        assert found.denominator == loss.denominator == sum(LENGTHS)
    else:
        assert model(packed(segments), torch.cat(segments)).denominator == sum(LENGTHS) - 4


def test_what_comes_later_stands_further_in_front() -> None:
    model, segments = make_model(), make_segments(*LENGTHS)
    whole = packed([torch.cat((torch.tensor([5]), FRONT, segment)) for segment in segments])
    hidden = model.model(whole)[whole.segments.cu_seqlens[1:] - 1]
    add_virtual_tokens(model)
    late = model.model.embed_tokens.weight[5:6]
    model.model.input_modules["downstream"] = VirtualTokens(late)
    batch = packed(segments)
    close(model.model(batch)[batch.segments.cu_seqlens[1:] - 1], hidden)


def test_a_prompt_is_a_second_softmax() -> None:
    """One layer, by hand."""
    model = make_model()
    add_prompts(model)
    attention = model.model.layers[0].self_attn
    q, o = torch.randn(2, 6, 4, attention.head_dim, dtype=torch.float64)
    prompt = attention.prompts["clinical"]
    keys, values = (
        layer(prompt.rows).unflatten(1, (-1, attention.head_dim))
        for layer in (attention.k_proj, attention.v_proj)
    )
    close(attention._prompted(o, q), o + prompt(q, keys, values))


@pytest.mark.parametrize("add", ADDITIONS)
def test_packed_equals_one_by_one_with_gradients(
    add: Callable[[CausalLM | SequenceClassifier], None],
) -> None:
    model, segments = make_model(), make_segments(*LENGTHS)
    torch.manual_seed(0)
    add(model)
    model.model.requires_grad_(False)
    added = [
        parameter.requires_grad_(True)
        for name, parameter in model.named_parameters()
        if "clinical" in name
    ]

    def gradients(batches: list[TokenBatch], **options: bool) -> list[Tensor]:
        for batch in batches:
            model(batch, batch.input_ids, **options).loss_sum.backward()
        found = [parameter.grad for parameter in added]
        for parameter in added:
            parameter.grad = None
        return found

    alone = [packed([segment]) for segment in segments]
    close(model.model(packed(segments)), torch.cat([model.model(batch) for batch in alone]))
    together = gradients([packed(segments)])
    for one, other in zip(gradients(alone), together, strict=True):
        assert one.any()
        close(one, other, 1e-10)
    for one, other in zip(
        gradients([packed(segments)], activations="checkpoint"), together, strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("add", ADDITIONS)
def test_generation_with_a_cache_equals_generation_without(
    add: Callable[[CausalLM | SequenceClassifier], None],
) -> None:
    model = make_model()
    without = generate(model, [[1, 5, 9], [1]], GenerationConfig(max_new_tokens=12))
    torch.manual_seed(0)
    add(model)
    config = GenerationConfig(max_new_tokens=12, stop_ids=tuple(range(0, 97, 11)))
    prompts = [[1, 5, 9], [1], [1, 80, 3, 44, 12, 7, 7, 31]]
    cached = generate(model, prompts, config)
    assert cached == generate(model, prompts, config, use_cache=False)
    assert cached[:2] != without
    alone = [generate(model, [prompt], config)[0] for prompt in prompts]
    assert cached == alone


def test_generation_counts_what_stands_in_front() -> None:
    model = make_model()
    limit = model.config.max_position_embeddings
    add_prefix(model)
    with pytest.raises(ValueError, match="and 3 places of the adapters that passes"):
        generate(model, [[1, 2]], GenerationConfig(max_new_tokens=limit - 4))


@pytest.mark.parametrize("add", ADDITIONS)
def test_a_pooled_row_is_the_last_row(add: Callable[[CausalLM | SequenceClassifier], None]) -> None:
    model = SequenceClassifier(make_config(), 3).double()
    randomise(model, 0)
    torch.manual_seed(0)
    add(model)
    batch = packed(make_segments(*LENGTHS))
    pooled = model.model(batch, pool=True)
    close(pooled, model.model(batch)[batch.segments.cu_seqlens[1:] - 1], 1e-10)


def test_rows_are_joined_where_they_belong() -> None:
    behind = Segments.from_offsets([0, 2, 3]).behind(2)
    assert behind.segments.offsets == (0, 4, 7)
    assert behind.tokens.tolist() == [2, 3, 6]
    joined = behind.join(torch.tensor([-1, -2]), torch.tensor([10, 11, 20]))
    assert joined.tolist() == [-1, -2, 10, 11, -1, -2, 20]
