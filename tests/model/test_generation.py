"""Generation against transformers, and its own promise: neither company nor cache matters."""

import copy
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lora.attach import adapter_parameters, attach
from lora.config import LoraConfig
from model import decoding
from model.batch import TokenBatch
from model.cache import KVCache
from model.checkpoint import load_causal_lm, save_model
from model.config import DecoderConfig
from model.decoding import Plan, _Halves, _halves
from model.generation import GenerationConfig, _adjusted, _choose, _joined, generate, stream
from model.heads import CausalLM
from tests.model.oracle import (
    CONFIGS,
    float64_twin,
    hugging_face_twin,
    make_causal_lm,
    make_config,
    relative_error,
)

PROMPTS = [[1, 5, 9], [1], [1, 80, 3, 44, 12, 7, 7, 31], [1, 5, 9]]
SAMPLED = GenerationConfig(
    max_new_tokens=12, temperature=3.0, top_k=20, top_p=0.9, repetition_penalty=1.2
)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return make_causal_lm(make_config())


def test_greedy_stories_are_those_of_transformers(real_data: Path) -> None:
    """A real checkpoint in float32, with and without a cache, from BOS alone."""
    folder = real_data / "stories260k"
    ours = load_causal_lm(folder)
    config = GenerationConfig(max_new_tokens=255)
    (cached,) = generate(ours, [[1]], config)
    (recomputed,) = generate(ours, [[1]], config, use_cache=False)
    twin = hugging_face_twin(ours)
    story = twin.generate(
        torch.tensor([[1]]), max_new_tokens=255, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert len(set(cached)) > 50  # a story, no loop
    assert cached == recomputed == story[0, 1:].tolist()


LONG_PROMPT = [1, *range(3, 90, 2)]
# Of 44 tokens, so a window of 9 has passed over most of the prompt before the first new token, and
# one of 16 twice more before the last; a prompt of one token grows beyond its window.
WINDOWS = ["mistral-window", "mistral-window-of-two", "mixtral-window"]


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_beyond_the_window_is_that_of_transformers(name: str, use_cache: bool) -> None:
    ours = make_causal_lm(CONFIGS[name])
    twin = float64_twin(ours)
    prompts = [LONG_PROMPT, [1], [1, 80, 3, 44, 12, 7, 7, 31], LONG_PROMPT[:10]]
    config = GenerationConfig(max_new_tokens=40)
    found = generate(ours, prompts, config, use_cache=use_cache)
    for prompt, tokens in zip(prompts, found, strict=True):
        expected = twin.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert tokens == expected[0, len(prompt) :].tolist()
    without = make_causal_lm(dataclasses.replace(ours.config, sliding_window=None))
    assert generate(without, prompts, config) != found


@pytest.mark.parametrize("config", [GenerationConfig(max_new_tokens=30), SAMPLED])
@pytest.mark.parametrize("name", [*WINDOWS, "mixtral"])
def test_a_batch_beyond_the_window_equals_its_prompts_one_by_one(
    name: str, config: GenerationConfig
) -> None:
    model = make_causal_lm(CONFIGS[name])
    config = dataclasses.replace(config, stop_ids=tuple(range(0, 97, 24)))
    prompts = [*PROMPTS, LONG_PROMPT]
    together = generate(model, prompts, config, seed=4)
    for use_cache in (True, False):
        assert together == [
            generate(model, [prompt], config, seed=4 + i, use_cache=use_cache)[0]
            for i, prompt in enumerate(prompts)
        ]


def make_adapted(config: DecoderConfig) -> CausalLM:
    """Two adapters on some layers, of which the second is alone on others."""
    model = make_causal_lm(config)
    for name, targets in (("a", ("q_proj", "v_proj", "down_proj")), ("b", ("v_proj", "up_proj"))):
        attach(model, name, LoraConfig(r=3, lora_alpha=6, target_modules=targets), seed=0)
        for parameter in adapter_parameters(model, name):
            parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    return model.double()


NARROW = (torch.float64, torch.bfloat16)
LAYOUTS = [
    # Bytes below which layers are stacked, tokens and sequences that are asked for, types, and what
    # a checkpoint holds the weights in.
    pytest.param(0, 12, 1, NARROW, None, id="stored"),
    pytest.param(1 << 20, 12, 1, NARROW, None, id="stacked"),
    pytest.param(0, 64, 1, (torch.float32,), None, id="transposed"),
    pytest.param(0, 64, 3, (torch.float32,), None, id="blocked"),
    pytest.param(0, 64, 1, (torch.float32,), torch.float16, id="float16"),
    pytest.param(0, 64, 3, (torch.float32,), torch.bfloat16, id="bfloat16"),
]


@pytest.mark.parametrize(("stacked_bytes", "tokens_each", "count", "dtypes", "held"), LAYOUTS)
@pytest.mark.parametrize(
    "name", ["grouped-query", "tied", "attention-bias", "mlp-bias", "llama3-rope", "mistral-window"]
)
def test_the_steps_of_a_plan_are_the_decoders_rows(
    name: str,
    stacked_bytes: int,
    tokens_each: int,
    count: int,
    dtypes: tuple[torch.dtype, ...],
    held: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With adapters, and sequences of several lengths; in narrower types as near to float64.

    A plan may be made for fewer sequences than it then steps: layouts differ in speed alone.
    """
    monkeypatch.setattr(decoding, "_STACKED_BYTES", stacked_bytes)
    prompts = [[1, 5, 9], [1], [1, *range(3, 20)]]
    for dtype in dtypes:
        ours = make_adapted(CONFIGS[name]).to(held).to(dtype)
        exact = copy.deepcopy(ours).double()
        caches = []
        for network in (exact, ours, ours):
            room = {"dtype": network.head_weight.dtype, "device": "cpu"}
            caches.append(KVCache(ours.config, len(prompts), 40, **room))
            with torch.no_grad():
                network.model(_joined(prompts), cache=caches[-1])
        plan = Plan.of(ours, 40, count=count, tokens=tokens_each)
        assert plan is not None
        assert isinstance(plan._head, _Halves) == (held is not None)
        truths, oracles, steps = [], [], []
        for step in range(12):
            tokens = [3 + step, 50 - step, 7]
            pieces = _joined([[token] for token in tokens])
            with torch.no_grad():
                truths.append(exact.head_logits(exact.model(pieces, cache=caches[0])))
                oracles.append(ours.head_logits(ours.model(pieces, cache=caches[1])))
                steps.append(plan.step(tokens, caches[2]))
        truth, oracle, found = (torch.cat(rows) for rows in (truths, oracles, steps))
        assert relative_error(found, truth) <= max(2 * relative_error(oracle, truth), 1e-12)
    plain = make_causal_lm(CONFIGS[name])
    config = GenerationConfig(max_new_tokens=12)
    assert generate(plain, PROMPTS, config) != generate(make_adapted(plain.config), PROMPTS, config)


@pytest.mark.parametrize("bias", [None, torch.tensor([1.0, -2.0, 0.5])])
def test_float16_holds_a_weight_exactly_or_not_at_all(
    bias: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of float32 sums of float32 products nothing is rounded where they are few powers of two."""
    monkeypatch.setattr(decoding, "_STACKED_BYTES", 0)

    def product(weight: list[list[float]]) -> Tensor | None:
        halves = _halves(torch.nn.Module(), [torch.tensor(weight)])
        return None if halves is None else _Halves(*halves, bias)(torch.tensor([[4.0, 8192.0]]))

    added = torch.zeros(3) if bias is None else bias
    step = 1 + 2.0**-7  # of bfloat16 at 1
    for largest in (1.0, 1.5 * 2.0**14, 2.0**-40):  # as it is, nearly too large, and scaled up
        small = largest * step * 2.0**-13  # a product as large as that of 4
        weight = [[largest, small], [0.0, -small], [-largest, 0.0]]
        expected = 4 * largest * torch.tensor([1 + step / 4, -step / 4, -1.0]) + added
        found = product(weight)
        assert found is not None
        assert torch.equal(found, expected[None])
    # As far as float32 has normal powers of two: runs flush others.
    tiny = product([[2.0**-120, 0.0], [0.0, 2.0**-120], [0.0, 0.0]])
    assert tiny is not None
    assert torch.equal(tiny, (torch.tensor([2.0**-118, 2.0**-107, 0.0]) + added)[None])
    # The last bit of float32, one that is too small beside the largest, one that is too large.
    for value, other in ((1 + 2.0**-23, 0.0), (1.0, 2.0**-45), (2.0**17, 0.0)):
        assert product([[value, other], [0.0, 0.0], [0.0, 0.0]]) is None


def test_packed_weights_are_kept_until_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_STACKED_BYTES", 0)
    model = make_causal_lm(make_config()).half().float()
    config = GenerationConfig(max_new_tokens=64)

    def packed() -> list[torch.ScriptObject]:
        plan = Plan.of(model, 128, count=1, tokens=64)
        assert plan is not None
        groups = [plan._head, *(p for layer in plan._layers for p in layer.gate_up.products)]
        return [group.packed for group in groups if isinstance(group, _Halves)]

    first, before = packed(), generate(model, PROMPTS, config)
    assert len(first) == 1 + model.config.num_hidden_layers
    assert all(a is b for a, b in zip(packed(), first, strict=True))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.neg_()  # type: ignore[union-attr]
        model.lm_head.weight.data = -model.lm_head.weight.data
    second = packed()
    assert [a is b for a, b in zip(first, second, strict=True)] == [False, False, True]
    after = generate(model, PROMPTS, config)
    assert after == generate(copy.deepcopy(model), PROMPTS, config, use_cache=False) != before


def test_weights_made_in_inference_mode_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch does not count their changes."""
    monkeypatch.setattr(decoding, "_STACKED_BYTES", 0)
    plain = make_causal_lm(make_config()).half().float()
    with torch.inference_mode():
        model = copy.deepcopy(plain)
        config = GenerationConfig(max_new_tokens=64)
        before = generate(model, PROMPTS, config)
        assert before == generate(plain, PROMPTS, config)
        model.lm_head.weight.neg_()
        after = generate(model, PROMPTS, config)
    assert after == generate(model, PROMPTS, config, use_cache=False) != before


def test_a_decoder_that_a_plan_does_not_cover_has_none() -> None:
    """And generates by the forward pass, as the tests with experts show."""
    assert Plan.of(make_causal_lm(CONFIGS["mixtral"]), 10, count=1, tokens=8) is None


def test_weights_are_laid_out_where_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    def layout(network: CausalLM, count: int, tokens: int) -> str:
        plan = Plan.of(network, 128, count=count, tokens=tokens)
        assert plan is not None
        return plan.layout

    small = make_causal_lm(make_config()).float()
    assert layout(small, 1, 64) == "transposed"
    assert layout(small, 2, 64) == "blocked"
    assert layout(small, 2, 63) == "stored"
    assert layout(copy.deepcopy(small).bfloat16(), 2, 64) == "stored"
    size = 4 * sum(parameter.numel() for parameter in small.parameters())
    monkeypatch.setattr(decoding, "_LAID_OUT_BYTES", size)
    assert layout(small, 2, 64) == "blocked"
    monkeypatch.setattr(decoding, "_LAID_OUT_BYTES", size - 1)
    assert layout(small, 2, 64) == "stored"


@pytest.mark.parametrize("name", ["grouped-query", "tied", "mlp-bias", "mistral-window", "mixtral"])
def test_int8_weights_generate_as_their_floats_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written out once in a plan or at each step, alone and in a batch of several lengths."""
    monkeypatch.setattr(decoding, "_STACKED_BYTES", 0)
    save_model(make_causal_lm(CONFIGS[name]), tmp_path / "floating")
    ours = load_causal_lm(tmp_path / "floating", int8="bf16")
    save_model(ours, tmp_path / "int8")
    config = GenerationConfig(max_new_tokens=64)
    prompts = [*PROMPTS, LONG_PROMPT]
    expected = generate(load_causal_lm(tmp_path / "int8"), prompts, config, use_cache=False)
    assert expected != generate(load_causal_lm(tmp_path / "floating"), prompts, config)
    assert generate(ours, prompts, config) == expected
    assert [generate(ours, [prompt], config)[0] for prompt in prompts] == expected
    assert (Plan.of(ours, 128, count=2, tokens=64) is None) == (name == "mixtral")
    assert Plan.of(ours, 128, count=2, tokens=8) is None  # too few to write the weights out
    math = load_causal_lm(tmp_path / "int8", int8="int8")
    assert Plan.of(math, 128, count=2, tokens=64) is None


def test_a_rolling_cache_holds_a_window_and_no_more() -> None:
    config = CONFIGS["mistral-window"]
    room = {"dtype": torch.float32, "device": "cpu"}
    rolling, whole = KVCache(config, 3, 4000, **room), KVCache(make_config(), 3, 4000, **room)
    assert rolling.nbytes == 2 * 2 * 3 * config.sliding_window * 2 * 8 * 4  # k and v, two layers
    assert whole.nbytes == rolling.nbytes // config.sliding_window * 4000
    assert KVCache(config, 3, 5, **room).nbytes == rolling.nbytes // config.sliding_window * 5


@pytest.mark.parametrize("name", ["multi-head", "grouped-query", "tied", "llama3-rope", "mixtral"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens_are_those_of_transformers(name: str, use_cache: bool) -> None:
    ours = make_causal_lm(CONFIGS[name])
    twin = hugging_face_twin(ours)
    config = GenerationConfig(max_new_tokens=20, repetition_penalty=1.3)
    found = generate(ours, PROMPTS, config, use_cache=use_cache)
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        expected = twin.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=20,
            do_sample=False,
            repetition_penalty=1.3,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert tokens == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("config", [GenerationConfig(max_new_tokens=12), SAMPLED])
@pytest.mark.parametrize("stop_ids", [(), tuple(range(0, 97, 8))])
def test_a_batch_equals_its_prompts_one_by_one(
    model: CausalLM, config: GenerationConfig, stop_ids: tuple[int, ...]
) -> None:
    config = dataclasses.replace(config, stop_ids=stop_ids)
    together = generate(model, PROMPTS, config, seed=4)
    for use_cache in (True, False):
        alone = [
            generate(model, [prompt], config, seed=4 + i, use_cache=use_cache)[0]
            for i, prompt in enumerate(PROMPTS)
        ]
        assert together == alone
    lengths = [len(tokens) for tokens in together]
    if stop_ids:
        assert min(lengths) < max(lengths)  # some ran on after others had stopped
        for tokens in together:
            assert not set(tokens[:-1]) & set(stop_ids)
            assert tokens[-1] in stop_ids or len(tokens) == config.max_new_tokens
    else:
        assert lengths == [12] * 4


def test_equal_prompts_draw_different_samples_unless_the_seed_is_equal(model: CausalLM) -> None:
    first, *_, last = generate(model, PROMPTS, SAMPLED, seed=4)
    assert first != last
    assert generate(model, [PROMPTS[0]], SAMPLED, seed=7) == [last]


def test_logits_are_adjusted_as_in_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 300, generator=generator) * 3
    sequences = torch.randint(300, (5, 30), generator=generator)
    config = GenerationConfig(
        max_new_tokens=1, repetition_penalty=1.7, temperature=0.6, top_k=25, top_p=0.8
    )
    oracle = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.7),
            TemperatureLogitsWarper(0.6),
            TopKLogitsWarper(25),
            TopPLogitsWarper(0.8),
        ]
    )
    found = _adjusted(logits, sequences.tolist(), config)
    assert torch.equal(found, oracle(sequences, logits.clone()))
    logits[:, :40] = logits.max()  # a tie over the edge of top-k is kept whole
    config = GenerationConfig(max_new_tokens=1, temperature=0.6, top_k=25)
    found = _adjusted(logits, sequences.tolist(), config)
    assert torch.equal(found, LogitsProcessorList(oracle[1:3])(sequences, logits.clone()))


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.2, 0.3, 0.0])
    config = GenerationConfig(max_new_tokens=1, temperature=1.0)
    count = 5_000
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    tokens = Counter(_choose(probabilities.log().expand(count, -1), generators, config))
    assert tokens.keys() == {1, 2, 3}
    for token, occurrences in tokens.items():
        share = float(probabilities[token])
        spread = (share * (1 - share) / count) ** 0.5
        assert abs(occurrences / count - share) < 4 * spread


def test_a_draw_at_the_edge_never_takes_an_impossible_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]])
    config = GenerationConfig(max_new_tokens=1, temperature=1.0)
    for draw, token in ((0.0, 1), (1.0 - 2.0**-53, 2)):
        uniform = torch.tensor(draw, dtype=torch.float64)
        monkeypatch.setattr(torch, "rand", lambda *_, uniform=uniform, **__: uniform)
        assert _choose(logits, [torch.Generator()], config) == [token]


def test_no_prompts_give_no_tokens(model: CausalLM) -> None:
    assert generate(model, [], SAMPLED) == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 1 is empty"),
        ([[97]], "outside the vocabulary of 97"),
        ([[-1]], "outside the vocabulary of 97"),
        ([[1] * 120], "120 tokens; with max_new_tokens 12 that passes the model's 128 positions"),
    ],
)
def test_impossible_prompts_are_refused(
    model: CausalLM, prompts: list[list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, SAMPLED)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("repetition_penalty", 0.0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
    ],
)
def test_impossible_settings_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        GenerationConfig(**{"max_new_tokens": 1} | {field: value})


@pytest.mark.parametrize("config", [GenerationConfig(max_new_tokens=12), SAMPLED])
def test_a_stream_is_what_generation_gives_token_by_token(
    model: CausalLM, config: GenerationConfig
) -> None:
    (whole,) = generate(model, [PROMPTS[2]], config, seed=3)
    tokens = stream(model, PROMPTS[2], config, seed=3)
    assert [next(tokens) for _ in range(4)] == whole[:4]
    assert torch.ones(1, requires_grad=True).mul(2).requires_grad  # between two tokens as before
    assert list(tokens) == whole[4:]
    stopped = dataclasses.replace(config, stop_ids=(whole[5],))
    assert list(stream(model, PROMPTS[2], stopped, seed=3)) == whole[: whole.index(whole[5]) + 1]


def test_equal_prompts_are_read_once_and_go_their_own_ways(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]]
    alone = [generate(model, [p], SAMPLED, seed=i)[0] for i, p in enumerate(prompts)]
    read: list[int] = []
    forward = model.model.forward

    def counted(batch: TokenBatch, **more: Any) -> Tensor:
        read.append(len(batch.input_ids))
        return forward(batch, **more)

    monkeypatch.setattr(model.model, "forward", counted)
    assert generate(model, prompts, SAMPLED, seeds=[0, 1, 2, 3]) == alone
    assert read == [len(PROMPTS[0]) + len(PROMPTS[1])]
    assert len({tuple(alone[i]) for i in (0, 2, 3)}) == 3
