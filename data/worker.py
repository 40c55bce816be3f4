"""A tokenising process: texts go in by a pipe, token ids and text digests come back.

A worker is a fresh Python that runs this module: it never re-imports the program that started it,
so it needs neither torch nor a guarded main module, and starts in about 0.2 s. Both directions
carry plain arrays (a count, the lengths, the bytes), no pickle. A block is about a mebibyte, large
enough that the parent spends its time reading the table.

Invariant: a worker ends when its input ends, so none outlives the process that started it.
"""

import contextlib
import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data.prompts import PromptEncoder, open_encoder
from data.tokenizer import Tokenizer, token_dtype

PIPE_BYTES = 1 << 20
TextEncoder = Tokenizer | PromptEncoder  # notes as they are, or conversations in a format


class EncodedTexts(NamedTuple):
    """Token ids of n texts, end to end, and the MD5 of each text."""

    counts: np.ndarray  # uint32 [n]
    tokens: np.ndarray  # uint16 or uint32 [counts.sum()]
    digests: np.ndarray  # S16 [n]


def encode_texts(tokenizer: TextEncoder, texts: Sequence[str]) -> EncodedTexts:
    """Tokenises a block of texts in this process."""
    ids = tokenizer.encode_many(texts)
    counts = np.fromiter(map(len, ids), np.uint32, len(ids))
    tokens = np.concatenate(ids) if ids else np.zeros(0, token_dtype(tokenizer.vocab_size))
    digests = b"".join(hashlib.md5(text.encode(), usedforsecurity=False).digest() for text in texts)
    return EncodedTexts(counts, tokens, np.frombuffer(digests, "S16"))


class Worker:
    """The parent's end: starts the process, and encodes one block at a time by it."""

    def __init__(self, tokenizer: TextEncoder) -> None:
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *tokenizer.arguments()],
            cwd=Path(__file__).resolve().parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin: BinaryIO = self._process.stdin  # type: ignore[assignment]
        self._stdout: BinaryIO = self._process.stdout  # type: ignore[assignment]
        _widen(self._stdin)
        _widen(self._stdout)

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """`encode_texts` in the process; raises RuntimeError when the process has died."""
        try:
            _send_texts(self._stdin, texts)
            counts = _receive(self._stdout, len(texts), np.dtype(np.uint32))
            tokens = _receive(self._stdout, int(counts.sum()), self._dtype)
            return EncodedTexts(counts, tokens, _receive(self._stdout, len(texts), _DIGEST))
        except (EOFError, BrokenPipeError):
            code = self._process.wait()
            raise RuntimeError(
                f"a tokenising process ended with code {code} (-9: killed, often for memory); "
                f"run again, with fewer workers if memory is short"
            ) from None

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._stdout.close()
        with contextlib.suppress(BrokenPipeError):  # bytes may have been on their way to it
            self._stdin.close()


_DIGEST = np.dtype("S16")


def _send_texts(pipe: BinaryIO, texts: Sequence[str]) -> None:
    encoded = [text.encode() for text in texts]
    lengths = np.fromiter(map(len, encoded), np.uint32, len(encoded))
    pipe.write(np.uint32(len(encoded)).tobytes() + lengths.tobytes() + b"".join(encoded))
    pipe.flush()


def _receive(pipe: BinaryIO, count: int, dtype: np.dtype) -> np.ndarray:
    content = pipe.read(count * dtype.itemsize)
    if len(content) < count * dtype.itemsize:
        raise EOFError
    return np.frombuffer(content, dtype)


def _widen(pipe: BinaryIO) -> None:
    """Lets a whole block lie in the pipe (Linux), so that neither side waits for the other."""
    if sys.platform == "linux":
        import fcntl

        try:
            fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except PermissionError:  # over the user's allowance: the pipe stays as it is, only slower
            return


def main() -> None:
    """The process's end: answers every block of texts until the input ends."""
    tokenizer = open_encoder(sys.argv[1:])
    read, write = sys.stdin.buffer, sys.stdout.buffer
    while header := read.read(4):
        count = int(np.frombuffer(header, np.uint32)[0])
        lengths = _receive(read, count, np.dtype(np.uint32))
        content = read.read(int(lengths.sum()))
        ends = np.cumsum(lengths, dtype=np.int64).tolist()
        starts = [0, *ends]
        texts = [content[a:b].decode() for a, b in zip(starts, ends, strict=False)]
        encoded = encode_texts(tokenizer, texts)
        write.write(encoded.counts.tobytes() + encoded.tokens.tobytes() + encoded.digests.tobytes())
        write.flush()


if __name__ == "__main__":
    main()
