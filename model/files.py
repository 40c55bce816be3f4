"""JSON and safetensors on disk: read with limits, written whole or not at all.

The invariant: a final name never holds half a file. Everything is written beside its place, synced
to the disk and renamed, so after a crash a reader finds the old content or the new. What a killed
writer left behind bears a fixed name (`.NAME.partial`) that the next writer clears.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MAX_JSON_BYTES = 64 << 20
_SEAL = "sha256"


def read_json(path: Path) -> Any:
    """Parse a JSON file; refuses duplicate keys, NaN, more than 64 MB and what is not JSON."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is not a file")
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; at most {MAX_JSON_BYTES:,} are read as JSON")
    try:
        return json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as error:
        # The parser's own message may quote the file, which may be anything the user pointed at.
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise ValueError(f"{path} is not valid JSON: {reason}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"the number {name} is not allowed")


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file for lazy reads; a damaged or missing one is a ValueError."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is not a file; restore it from where it came")
    try:
        # Read, not mapped: nothing in memory depends on the file, nor counts twice.
        with safe_open(path, framework="pt", backend="pread") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}); copy or download it again"
        ) from error


def read_finite(
    file: Any,
    name: str,
    *,
    path: Path,
    part: tuple[int, slice] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Read a tensor of `path`, open as `file`, as `dtype` (None: as stored), and check its values.

    part: of a stack of matrices, which one and which of its rows; the others are not read.

    A NaN or an infinity would travel through every step without a word, so it is a ValueError, as
    is a value too large for `dtype`.
    """
    stored = file.get_tensor(name) if part is None else file.get_slice(name)[part]
    tensor = stored.to(device, dtype or stored.dtype)
    if not is_finite(tensor):
        raise ValueError(
            f"{path}: {name} holds a value that is not finite"
            f"{'' if tensor.dtype == stored.dtype else f' as {str(tensor.dtype)[6:]}'}; "
            "copy or download the file again, or make it anew"
        )
    return tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no value of a tensor is NaN or infinite; one pass, without a copy."""
    ends = torch.aminmax(tensor) if tensor.numel() else ()  # both are NaN if one value is
    return all(bool(end.isfinite()) for end in ends)


def file_inside(folder: Path, name: str) -> Path:
    """The path of a file of `folder`; a name or a link that leads out of it is a ValueError."""
    if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
        raise ValueError(f"{folder} names a file {name!r}; only plain file names are followed")
    path = folder / name
    if path.exists() and path.resolve().parent != folder.resolve():
        raise ValueError(f"{path} is a link out of its folder; put the file itself there")
    return path


def write_json(path: Path, value: Any) -> None:
    """Write JSON, atomically and readable by the owner alone."""
    text = _json_text(value)
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_sealed_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with the SHA-256 of its own text as one more entry, `sha256`."""
    write_json(path, _sealed(value))


def read_sealed_json(path: Path) -> dict[str, Any]:
    """Read what `write_sealed_json` wrote; ValueError if any byte is not as it was written."""
    found = read_json(path)
    content = dict(found) if isinstance(found, dict) else {}
    content.pop(_SEAL, None)
    if path.read_bytes() != _json_text(_sealed(content)).encode():
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one that was written")
    return content


def _sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    return {**value, _SEAL: hashlib.sha256(_json_text(value).encode()).hexdigest()}


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors of any device and layout, atomically and readable by the owner alone.

    The same tensors and metadata make the same bytes.
    """
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # Loaders of the Hugging Face family look for this entry.
    header = {"format": "pt", **(metadata or {})}

    def save(aside: Path) -> None:
        try:
            save_file(on_host, aside, header)
        except SafetensorError as error:
            raise OSError(f"writing {path} failed: {error}") from error
        _order_metadata(aside)

    write_whole(path, save)


def _order_metadata(path: Path) -> None:
    """Put a header's metadata in order of its keys: safetensors writes them in a random one."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        assert len(text) == size  # the same entries; behind the header the tensors stay in place
        file.seek(8)
        file.write(text)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a new file beside `path`, then put that in the place of `path`."""
    aside = path.with_name(f".{path.name}.partial")
    aside.unlink(missing_ok=True)
    try:
        os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        write(aside)
        sync(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; when the block ends well it becomes `folder`.

    Files made with this module's writers are already synced. `folder` may not hold anything yet.
    """
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ValueError(f"{folder} already exists; remove it or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.partial")
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(mode=0o700)
    try:
        yield aside
        sync(aside)
        os.replace(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync(folder.parent)


def copy_file(source: Path, path: Path) -> None:
    """Copy a file's content, atomically and readable by the owner alone."""
    write_whole(path, lambda aside: shutil.copyfile(source, aside))


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path, suffixes: Iterable[str]) -> str:
    """SHA-256 over names and contents of a folder's own files that have one of the suffixes."""
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in set(suffixes)):
        whole.update(f"{path.name}\0{file_digest(path)}\0".encode())
    return whole.hexdigest()


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files of a folder, by their paths in it: what `check_files` compares."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": file_digest(folder / name)}
        for name in names
    }


def check_files(folder: Path, described: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare every byte of the files with what `describe_files` said when they were written.

    Raises ValueError with the name of the first that is missing, of another size or damaged.
    """
    for name, written in described.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        size = file.stat().st_size
        if size != written["bytes"]:
            raise ValueError(f"{file} has {size} bytes, but {written['bytes']} were written")
        if file_digest(file) != written["sha256"]:
            raise ValueError(f"{file} is damaged: its SHA-256 is not the one that was written")


def sync(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
