"""Folders of safetensors files, read and written a few rows at a time.

A file is the length of its header (uint64, little endian), the header (JSON: name → dtype, shape,
begin and end in the data) and the data, row-major and little endian
(https://huggingface.co/docs/safetensors). The library maps the file into memory, and every page
that was read stays on the process's account until the file is closed; hence this reader.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.errors import UserError
from llm_jax.interop.floats import BFLOAT16, FLOAT16

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
METADATA = {"format": "pt"}  # in every header; transformers refuses files without it
DTYPES = {"F32": np.dtype(np.float32), "F16": FLOAT16, "BF16": BFLOAT16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes, as in the library
_AGAIN = "download the file again."


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. dtype: as the file spells it; begin: bytes from the file's start."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int


class TensorFolder:
    """The tensors of a folder: of the files that an index names, of model.safetensors, or of all.
    The path of a file stands for that file alone.

    Raises:
      UserError: no such files, one is missing, damaged or cut short, or two hold the same tensor.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.tensors: dict[str, StoredTensor] = {}
        for file in _files(self.path):
            for name, tensor in _read_header(file).items():
                if name in self.tensors:
                    raise UserError(
                        f"{file} and {self.tensors[name].file} both hold the tensor {name}: "
                        f"leave the files of one checkpoint in the folder."
                    )
                self.tensors[name] = tensor
        self._check_index()

    def dtype(self, name: str) -> np.dtype:
        """The dtype that a tensor is stored in.

        Raises:
          UserError: another than float32, bfloat16 or float16.
        """
        tensor = self.tensors[name]
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"tensor {name} in {tensor.file} is stored as {tensor.dtype}, and only "
                f"{', '.join(DTYPES)} are read: convert the checkpoint to one of them."
            )
        return DTYPES[tensor.dtype]

    def rows(self, name: str, begin: int, end: int) -> np.ndarray:
        """Rows `begin` to `end` of a tensor along its first dimension, in its stored dtype.

        Raises:
          UserError: a dtype that is not read, or a file that has been cut short meanwhile.
        """
        tensor, dtype = self.tensors[name], self.dtype(name)
        width = math.prod(tensor.shape[1:])
        count = (end - begin) * width
        offset = tensor.begin + begin * width * dtype.itemsize
        values = np.fromfile(tensor.file, dtype, count, offset=offset)
        if values.size < count:
            raise UserError(f"{tensor.file} ends within the tensor {name}: {_AGAIN}")
        return values.reshape(end - begin, *tensor.shape[1:])

    def _check_index(self) -> None:
        if not (self.path / INDEX).exists():
            return
        for name, file in _read_index(self.path).items():
            found = self.tensors.get(name)
            if found is None or found.file.name != file:
                raise UserError(
                    f"{self.path / INDEX} says that {file} holds the tensor {name}, and it does "
                    f"not: download the folder again."
                )


def _files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    if (folder / INDEX).exists():
        files = [folder / name for name in sorted(set(_read_index(folder).values()))]
        for file in files:
            if not file.exists():
                raise UserError(f"{folder / INDEX} names {file.name}, which is not there: {_AGAIN}")
        return files
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    if any(folder.glob("pytorch_model*.bin")):
        raise UserError(
            f"{folder} holds its weights as pytorch_model.bin, which only torch reads: convert "
            f"them where transformers is installed, by AutoModelForCausalLM.from_pretrained(DIR)"
            f".save_pretrained(OTHER)."
        )
    raise UserError(f"{folder} holds no *.safetensors file: give the folder of a checkpoint.")


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor → file name."""
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / INDEX} has no readable weight_map: {_AGAIN}") from error


def _read_header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise UserError(f"{file} is cut short or no safetensors file: {_AGAIN}")
        text = stream.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors, ends = {}, [0]
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensor = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin)
            dtype = DTYPES.get(tensor.dtype)
            if dtype is not None and end - begin != math.prod(tensor.shape) * dtype.itemsize:
                raise ValueError(f"{name} has {end - begin} bytes")
            tensors[name] = tensor
            ends.append(end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} has a damaged header ({error}): {_AGAIN}") from error
    if 8 + length + max(ends) != size:
        raise UserError(
            f"{file} has {size:,} bytes, and its header speaks of {8 + length + max(ends):,}: "
            f"{_AGAIN}"
        )
    return tensors


# --- writing --------------------------------------------------------------------------------------


def write_folder(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    blocks: Callable[[str], Iterable[np.ndarray]],
    max_shard_bytes: int,
    stem: str,
) -> None:
    """Writes tensors of one dtype, in the order of `shapes`, and the index where files are several.

    Files stand under temporary names until all are complete; the index gets its name last.

    Args:
      folder: made where it is not there.
      shapes: tensor → shape.
      dtype: of all tensors: float32, bfloat16 or float16.
      blocks: gives the rows of a tensor, one block after the other, in that dtype.
      max_shard_bytes: of data in a file; a larger tensor has a file of its own.
      stem: what the files' names begin with.

    Raises:
      UserError: the folder holds weights already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob(f"{stem}*.safetensors*"):
        raise UserError(f"{file} exists: give a folder without weights.")
    shards = _shards(shapes, dtype.itemsize, max_shard_bytes)
    count = len(shards)
    names = [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    names = [*names, f"{stem}.safetensors.index.json"] if count > 1 else [f"{stem}.safetensors"]
    with _whole_or_gone(folder, names) as temporary:
        for shard, file in zip(shards, temporary, strict=False):
            with file.open("wb") as stream:
                stream.write(_header(shard, dtype))
                for tensor in shard:
                    for block in blocks(tensor):
                        # bfloat16 is no dtype that a stream knows; its bytes are.
                        stream.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
        if count > 1:
            total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
            holders = {t: name for shard, name in zip(shards, names, strict=False) for t in shard}
            index = {"metadata": {"total_size": total}, "weight_map": holders}
            temporary[-1].write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _shards(
    shapes: Mapping[str, tuple[int, ...]], itemsize: int, max_bytes: int
) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if shards[-1] and held + size > max_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = shape
        held += size
    return shards


def _header(shard: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> bytes:
    header: dict[str, Any] = {"__metadata__": METADATA}
    begin = 0
    for name, shape in shard.items():
        end = begin + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (begin, end)}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    return len(text).to_bytes(8, "little") + text


@contextlib.contextmanager
def _whole_or_gone(folder: Path, names: list[str]) -> Iterator[list[Path]]:
    """Temporary paths that get their names when all went well and are deleted otherwise."""
    temporary = [folder / f"{name}.partial" for name in names]
    try:
        yield temporary
        for file, name in zip(temporary, names, strict=True):
            file.replace(folder / name)
    finally:
        for file in temporary:
            file.unlink(missing_ok=True)
