"""Masks of every prompt format: the supervised text is the response and its end, nothing else."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from data.cache import tokenise
from data.conversations import Conversations, ConversationSegments
from data.packing import IGNORED
from data.prompts import (
    EOS,
    PROMPTS,
    PromptEncoder,
    Turn,
    check_turns,
    open_encoder,
    pack_turns,
    render,
    split_supervision,
    unpack_turns,
)
from data.tokenizer import Tokenizer, load_tokenizer
from tests.data.conftest import WORDS, train_sentencepiece

LLAMA_3 = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
KINDS = ("sentencepiece", "collapsing", "byte-level", "metaspace", "legacy")
ODD = [
    [Turn("user", "Name it.", "pain {input} {text}"), Turn("assistant", "  two spaces, a tail \n")],
    [Turn("user", "Name it."), Turn("assistant", "\n### Response:\n</s> <s>[INST] <|eot_id|>")],
    [Turn("user", "", "only input"), Turn("assistant", "E: fièvre à 39 °C, 熱")],
    [
        Turn("system", "Be brief."),
        Turn("user", "Is it fever?"),
        Turn("assistant", "Yes."),
        Turn("user", "And now?", "later"),
        Turn("assistant", "chest pain"),
    ],
]


def write_json_tokenizer(folder: Path, kind: str) -> Path:
    """A tokenizer.json as of Llama 3 (byte-level) or of Llama 2 (Metaspace, or its old form)."""
    folder.mkdir()
    model = tokenizers.models.BPE(unk_token="<unk>", byte_fallback=kind != "byte-level")
    tokenizer = tokenizers.Tokenizer(model)
    pre, decoders = tokenizers.pre_tokenizers, tokenizers.decoders
    bytes_of_text = [f"<0x{i:02X}>" for i in range(256)]
    special = ["<unk>", "<s>", "</s>", *LLAMA_3]
    if kind == "byte-level":
        tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre.ByteLevel.alphabet()
        learned = special
    else:
        alphabet, learned = [], [*special, *bytes_of_text]
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
        if kind == "metaspace":
            tokenizer.pre_tokenizer = pre.Metaspace(prepend_scheme="first")
        else:
            tokenizer.normalizer = tokenizers.normalizers.Sequence(
                [
                    tokenizers.normalizers.Prepend("▁"),
                    tokenizers.normalizers.Replace(" ", "▁"),
                ]
            )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=learned, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] in special]
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    folder = tmp_path_factory.mktemp("prompts") / request.param
    if request.param not in ("sentencepiece", "collapsing"):
        return load_tokenizer(write_json_tokenizer(folder, request.param))
    folder.mkdir()
    collapses = request.param == "collapsing"
    options = {"control_symbols": LLAMA_3, "remove_extra_whitespaces": collapses}
    return load_tokenizer(train_sentencepiece(folder / "tokenizer.model", **options))


def check_masks(encoder: PromptEncoder, turns: list[Turn]) -> None:
    """Each supervised run decodes to one response, its lead before it, and ends in its end."""
    (packed,) = encoder.encode_many([pack_turns(turns)])
    ids, supervised = split_supervision(packed)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], supervised, [0]))))
    runs = edges.reshape(-1, 2)
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    assert len(runs) == len(answers)
    own, lead = encoder.tokenizer, encoder.format.lead
    end = own.eos_id if encoder.format.end == EOS else own.token_id(encoder.format.end.token)
    for (start, stop), answer in zip(runs, answers, strict=True):
        assert ids[stop - 1] == end
        assert own.decode_continuation(ids[start : stop - 1]) == lead + answer
    # The prompt of the last answer, as inference writes it, is what stood before it in training.
    assert encoder.encode_prompt(turns[:-1]) == ids[: runs[-1][0]].tolist()
    assert (ids == own.bos_id).any() and ids[0] == own.bos_id
    assert not supervised[0]


@pytest.mark.parametrize("name", PROMPTS)
def test_supervised_text_is_the_response_and_its_end(tokenizer: Tokenizer, name) -> None:
    encoder = PromptEncoder(tokenizer, name)
    for turns in ODD:
        check_masks(encoder, turns)


@pytest.mark.parametrize("name", [name for name in PROMPTS if name != "llama-3"])
@pytest.mark.parametrize("model", ["llama2", "mistral_v1"])
def test_masks_on_real_rows_by_sentencepiece(real_data: Path, name, model: str) -> None:
    encoder = PromptEncoder(load_tokenizer(real_data / f"tokenizers/{model}.model"), name)
    for turns in real_rows(real_data):
        check_masks(encoder, turns)


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("kind", ["byte-level", "legacy"])
def test_masks_on_real_rows_by_tokenizer_json(
    real_data: Path, name, kind: str, tmp_path: Path
) -> None:
    encoder = PromptEncoder(load_tokenizer(write_json_tokenizer(tmp_path / kind, kind)), name)
    for turns in real_rows(real_data):
        check_masks(encoder, turns)


@functools.cache
def real_rows(real_data: Path) -> list[list[Turn]]:
    """1,000 rows of the real file, from all over it."""
    notes = list(Conversations(real_data / "instruct" / "medical_meadow_small.json"))
    assert len(notes) == 5942
    rows = [unpack_turns(note.text) for note in notes[:: len(notes) // 1000][:1000]]
    # U+2581 is how sentencepiece writes a space: no tokenizer of that kind gives it back.
    assert len(rows) == 1000 and not any("\u2581" in turn.text for row in rows for turn in row)
    return rows


def texts(name, turns: list[Turn]) -> str:
    """A conversation in a format as people write it, special tokens by name."""
    parts = (part for part, _ in render(PROMPTS[name], turns))
    return "".join(part if isinstance(part, str) else f"<{part.token}>" for part in parts)


def test_formats_are_those_that_were_published() -> None:
    row = [Turn("user", "I", "X"), Turn("assistant", "O")]
    primer = (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
    )
    sections = "### Instruction:\nI\n\n### Input:\nX\n\n### Response:\n"
    assert texts("alpaca", row) == texts("medalpaca", row) == f"<bos>{primer}{sections}O<eos>"
    bare = [Turn("user", "I"), Turn("assistant", "O")]
    assert texts("alpaca", bare) == (
        "<bos>Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nI\n\n### Response:\nO<eos>"
    )
    assert "### Input:\n\n\n### Response:\nO" in texts("medalpaca", bare)
    assert texts("medalpaca-question", row).endswith(
        "Response:\nThe Answer to the question is: O<eos>"
    )
    chat = [
        Turn("system", "S"),
        Turn("user", "U1"),
        Turn("assistant", "A1"),
        Turn("user", "U2"),
        Turn("assistant", "A2"),
    ]
    assert texts("llama-2", chat) == (
        "<bos>[INST] <<SYS>>\nS\n<</SYS>>\n\nU1 [/INST] A1<eos><bos>[INST] U2 [/INST] A2<eos>"
    )
    assert texts("mistral", chat) == (
        "<bos>[INST] S\n\nU1 [/INST] A1<eos>[INST] U2 [/INST] A2<eos>"
    )
    head, eot = "<<|start_header_id|>>{}<<|end_header_id|>>\n\n", "<<|eot_id|>>"
    assert texts("llama-3", chat) == "<bos>" + "".join(
        head.format(role) + said + eot
        for role, said in (
            ("system", "S"), ("user", "U1"), ("assistant", "A1"), ("user", "U2"),
            ("assistant", "A2"),
        )
    )  # fmt: skip
    assert texts("med42", bare) == (
        "<bos><|system|>: You are a helpful medical assistant created by M42 Health in the UAE.\n"
        "<|prompter|>:I\n<|assistant|>:O<eos>"
    )
    assert texts("plain", row) == "<bos>I\n\nX\nO<eos>"


def test_chat_ids_are_those_of_transformers(tmp_path: Path) -> None:
    """Llama 3's own template, through the library that the checkpoints are used with."""
    from transformers import PreTrainedTokenizerFast

    folder = write_json_tokenizer(tmp_path / "json", "byte-level")
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    theirs.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content }}<|eot_id|>{% endfor %}"
    )
    turns = ODD[3][:3]
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    text = theirs.apply_chat_template(messages, tokenize=False)
    expected = theirs(text, add_special_tokens=False).input_ids
    assert PromptEncoder(load_tokenizer(folder), "llama-3").encode(turns)[0] == expected


def test_one_tokenising_gives_the_same_ids_where_no_piece_reaches_over_the_edge(
    real_data: Path,
) -> None:
    """Alpaca through sentencepiece itself: prompt and response in one text, then EOS."""
    path = real_data / "tokenizers" / "llama2.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    encoder = PromptEncoder(load_tokenizer(path), "medalpaca")
    for turns in real_rows(real_data)[:50]:
        text = texts("medalpaca", turns).removeprefix("<bos>").removesuffix("<eos>")
        assert encoder.encode(turns)[0] == [1, *processor.encode(text), 2]


def test_a_format_whose_tokens_are_lacking_is_refused(tokenizer_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"--prompt-format llama-3 needs the token <\|"):
        PromptEncoder(load_tokenizer(tokenizer_folder), "llama-3")


def test_an_encoder_is_opened_again_elsewhere_and_known_by_its_format(tokenizer: Tokenizer) -> None:
    encoders = [PromptEncoder(tokenizer, name) for name in PROMPTS]
    assert len({encoder.fingerprint() for encoder in encoders}) == len(PROMPTS)
    for encoder in encoders:
        again = open_encoder(encoder.arguments())
        assert again.fingerprint() == encoder.fingerprint()


@pytest.mark.parametrize(
    ("turns", "fault"),
    [
        ([], "no turn"),
        ([Turn("system", "S")], "no turn"),
        ([Turn("assistant", "A")], "order"),
        ([Turn("user", "U")], "no output"),
        ([Turn("user", "U"), Turn("assistant", " \n")], "empty output"),
        ([Turn("user", " ", ""), Turn("assistant", "A")], "empty instruction"),
        ([Turn("user", "U"), Turn("bot", "A")], "role"),
        ([Turn("user", "U"), Turn("system", "S"), Turn("assistant", "A")], "order"),
    ],
)
def test_turns_that_are_no_conversation_are_refused(turns: list[Turn], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        check_turns(turns)


# Rows ---------------------------------------------------------------------------------------------

GOOD = {"instruction": "Answer", "input": "Why?", "output": "zebrafinch"}
BAD = {
    "no output": b'{"instruction": "zebrafinch", "input": ""}',
    "no input": b'{"instruction": "zebrafinch", "output": "b"}',
    "an empty output": b'{"instruction": "zebrafinch", "input": "", "output": " "}',
    "an empty instruction": b'{"instruction": "", "input": null, "output": "zebrafinch"}',
    "output that is no string": b'{"instruction": "zebrafinch", "input": "", "output": 3}',
    "text that is not UTF-8": b'{"instruction": "zebrafinch", "input": "", "output": "caf\xe9"}',
    "a NUL character": b'{"instruction": "zebrafinch", "input": "", "output": "a\\u0000"}',
    "no JSON object": b'["zebrafinch"]',
    "a message without a role": b'{"messages": [{"content": "zebrafinch"}]}',
    "messages that are no list": b'{"messages": "zebrafinch"}',
    "an id that an earlier row has": b'{"id": 7, "instruction": "z", "input": "", "output": "b"}',
}


def write_rows(path: Path, rows: list[bytes], *, is_array: bool) -> Path:
    joined = b"[\n" + b",\n".join(rows) + b"\n]\n" if is_array else b"\n".join(rows) + b"\n"
    path.write_bytes(joined)
    return path


@pytest.mark.parametrize("is_array", [True, False])
@pytest.mark.parametrize("fault", BAD)
def test_a_bad_row_is_refused_with_its_line_or_counted(
    tmp_path: Path, fault: str, is_array: bool
) -> None:
    rows = [json.dumps({**GOOD, "id": 7}).encode(), BAD[fault], json.dumps(GOOD).encode()]
    path = write_rows(tmp_path / "rows.json", rows, is_array=is_array)
    with pytest.raises(
        ValueError, match=f"rows.json: line {2 + is_array}: .* has {fault}"
    ) as error:
        Conversations(path)
    assert "zebrafinch" not in str(error.value)
    source = Conversations(path, bad_rows="skip")
    assert source.bad_rows == {fault: 1}
    assert [unpack_turns(note.text)[1].text for note in source] == ["zebrafinch"] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no row in it"),
        (b"[]", "no row in it"),
        (b'[{"instruction": "a"', "line 1: .* no valid JSON"),
        (b'[{"instruction": "a", "input": "", "output": "b"}', "cut off"),
        (b'[{"instruction": "a", "input": "", "output": "b"}] x', "follows"),
        (b'{"output": "b"\n', "line 1: .* has no valid JSON"),
        (b'{"instruction": "a", "instruction": "b"}\n', "has no valid JSON"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Conversations(tmp_path / "rows.json")


def test_a_cache_of_conversations_holds_no_text_and_both_ways_to_label(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    """Through worker processes too, which read the format by its name."""
    rows = [json.dumps({**GOOD, "input": f"Why {i}?"}).encode() for i in range(20_000)]
    source = Conversations(write_rows(tmp_path / "rows.jsonl", rows, is_array=False))
    encoder = PromptEncoder(load_tokenizer(tokenizer_folder), "plain")
    cache = tokenise(source, encoder, cache_folder=tmp_path / "cache", workers=2)
    for path in cache.folder.iterdir():
        assert b"zebrafinch" not in path.read_bytes()
    chosen = np.array([0, 19_999], np.uint32)
    for row in chosen:
        expected = encoder.encode_many([pack_turns([Turn("user", "Answer", f"Why {row}?"),
                                                    Turn("assistant", "zebrafinch")])])  # fmt: skip
        assert cache.tokens_of(row).tolist() == expected[0].tolist()
    segments = ConversationSegments(cache, chosen, max_length=200)
    batch = segments.batch(np.arange(2))
    own = encoder.tokenizer
    is_scored = batch.labels != IGNORED
    assert (batch.labels[is_scored] == batch.input_ids[is_scored]).all()
    half = batch.labels[: batch.offsets[1]]
    assert own.decode_continuation(half[half != IGNORED][:-1]) == "zebrafinch"
    assert segments.scored_tokens == is_scored.sum()
    whole = ConversationSegments(cache, chosen, max_length=200, scores_inputs=True)
    labels = whole.batch(np.arange(2)).labels
    assert np.flatnonzero(labels == IGNORED).tolist() == batch.offsets[:-1].tolist()


def test_a_moved_tokenizer_keeps_its_fingerprint(tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copy(tokenizer_folder / "tokenizer.model", tmp_path)
    first, second = (
        PromptEncoder(load_tokenizer(folder), "alpaca") for folder in (tokenizer_folder, tmp_path)
    )
    assert first.fingerprint() == second.fingerprint()
