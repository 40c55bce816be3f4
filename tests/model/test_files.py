"""Files on disk: the same content makes the same bytes, and a changed byte is noticed."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from model.files import (
    check_files,
    describe_files,
    read_sealed_json,
    write_safetensors,
    write_sealed_json,
)


def test_the_same_tensors_make_the_same_bytes(tmp_path: Path) -> None:
    """safetensors itself writes several entries of metadata in a random order."""
    tensors = {"b\u00e9": torch.arange(6.0).view(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}
    metadata = {"adapter": 'a "quoted" \\ n\u00e4me\n', "z": "\u0001", "m": ""}
    found = set()
    for i in range(12):
        path = tmp_path / f"{i}.safetensors"
        write_safetensors(path, dict(sorted(tensors.items(), reverse=i % 2 == 0)), metadata)
        found.add(path.read_bytes())
    assert len(found) == 1
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}


def test_a_sealed_file_notices_every_flipped_bit(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    content = {"format": 1, "rate": 0.1, "name": "\u00e9", "list": [1, None, True], "empty": {}}
    write_sealed_json(path, content)
    assert read_sealed_json(path) == content
    whole = path.read_bytes()
    damaged = [whole[:-1], whole + b"\n", b"", b"[]", b"{}"]
    damaged += [
        whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :]
        for i in range(len(whole))
        for bit in range(8)
    ]
    for content_now in damaged:
        path.write_bytes(content_now)
        with pytest.raises(ValueError, match=r"record\.json"):
            read_sealed_json(path)


def test_described_files_are_compared_byte_by_byte(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    described = describe_files(tmp_path, ["a", "b"])
    check_files(tmp_path, described)
    for content, message in (
        (b"b" * 99, "99 bytes, but 100 were written"),
        (b"b" * 99 + b"c", "is damaged: its SHA-256"),
    ):
        (tmp_path / "b").write_bytes(content)
        with pytest.raises(ValueError, match=f"/b .*{message}|/b {message}"):
            check_files(tmp_path, described)
    (tmp_path / "b").unlink()
    with pytest.raises(ValueError, match="/b is missing"):
        check_files(tmp_path, described)
