"""Safetensors shards, read no further than their headers and copied without loading a tensor.

A safetensors file is a length, a JSON header (name, dtype, shape and place of every tensor) and the
tensors' bytes. Everything about a model but its values is in the headers, so a repository of any
size is checked and copied in the same little memory.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import torch
from safetensors.torch import load

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library
ALIGNMENT = 8
COPY_BYTES = 16 * 2**20
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GLIMPSE_WEIGHTS = "glimpse.safetensors"  # of a run: the glimpse alone, under its own names
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip


class ConversionError(ValueError):
    """The given files are unsound or cannot become a repository; the message says which and why."""


@dataclass(frozen=True)
class Shard:
    """One safetensors file whose header was read and whose length agrees with it.

    Attributes:
        path: the file.
        tensors: header entry (`dtype`, `shape`, `data_offsets`) by tensor name.
        data_start: byte at which the tensors' data begins.
    """

    path: Path
    tensors: dict[str, dict]
    data_start: int

    @property
    def data_bytes(self) -> int:
        return max((entry["data_offsets"][1] for entry in self.tensors.values()), default=0)


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        ConversionError: when the file is missing or holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConversionError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold a JSON object")
    return content


def find_shards(folder: Path) -> list[Shard]:
    """The weights of a model folder: its shards in the index's order, or its single file.

    Raises:
        ConversionError: naming the file that is missing, truncated or no safetensors file, or what
            index and shards disagree about.
    """
    if not (folder / INDEX_FILE).exists():
        if not (folder / SINGLE_FILE).exists():
            raise ConversionError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
        return [read_shard(folder / SINGLE_FILE)]
    weight_map = read_weight_map(folder / INDEX_FILE)
    shards = [read_shard(folder / name) for name in dict.fromkeys(weight_map.values())]
    check_index(weight_map, shards)
    return shards


def read_weight_map(index: Path) -> dict[str, str]:
    """File name of each tensor, from an index.

    Raises:
        ConversionError: when there is none, or a file lies outside the index's folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index} has no weight_map")
    for name, file_name in weight_map.items():
        check_inside(file_name, f"{index} puts {name} into")
    return weight_map


def check_inside(file_name: object, told_by: str) -> None:
    """Raise a ConversionError unless a file's name stays inside its folder, on any system."""
    if isinstance(file_name, str) and file_name:
        path = PurePosixPath(file_name)
        if not (path.is_absolute() or ".." in path.parts or set("\\:") & set(file_name)):
            return
    raise ConversionError(f"{told_by} {file_name!r}, which is no file inside its folder")


def check_index(weight_map: dict[str, str], shards: list[Shard]) -> None:
    """Compare an index with the shards it names.

    Raises:
        ConversionError: naming a tensor that lies in two shards, in another than the index says, in
            none, or that the index does not know.
    """
    found: dict[str, str] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in found:
                raise ConversionError(f"{name} lies both in {found[name]} and in {shard.path.name}")
            found[name] = shard.path.name
    for name, file_name in weight_map.items():
        if name not in found:
            raise ConversionError(f"{INDEX_FILE} names {name}, which {file_name} does not hold")
        if PurePosixPath(file_name).name != found[name]:
            raise ConversionError(
                f"{INDEX_FILE} puts {name} into {file_name}, but it lies in {found[name]}"
            )
    for name, file_name in found.items():
        if name not in weight_map:
            raise ConversionError(f"{file_name} holds {name}, which {INDEX_FILE} does not name")


def read_shard(path: Path) -> Shard:
    """Read a safetensors header and check that the file holds what it announces.

    Raises:
        ConversionError: when the file is missing, truncated or no safetensors file.
    """
    if not path.is_file():
        raise ConversionError(f"shard {path} is missing")
    with path.open("rb") as file:
        return parse_shard(path, file, path.stat().st_size)


def parse_shard(path: Path, file: BinaryIO, size: int) -> Shard:
    """As `read_shard`, from the beginning of a file of `size` bytes that may lie elsewhere."""
    header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
    data_start = LENGTH_BYTES + header_bytes
    if data_start > size or header_bytes > MAX_HEADER_BYTES:
        raise ConversionError(f"{path} is truncated or not a safetensors file")
    try:
        tensors = json.loads(file.read(header_bytes), object_pairs_hook=_distinct(path))
        tensors.pop("__metadata__", None)
        announced = data_start + _check_layout(path, tensors)
    except ConversionError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ConversionError(f"{path} is not a safetensors file") from error
    if size != announced:
        raise ConversionError(
            f"{path} is truncated or damaged: {size} bytes where its header announces {announced}"
        )
    return Shard(path, tensors, data_start)


def _distinct(path: Path) -> Callable[[list[tuple]], dict]:
    def build(pairs: list[tuple]) -> dict:
        built = dict(pairs)
        if len(built) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ConversionError(f"{path} holds {twice} twice")
        return built

    return build


def _check_layout(path: Path, tensors: dict[str, dict]) -> int:
    """Bytes of data that a header announces, which its tensors must fill without overlap."""
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPE_BYTES:
            raise ConversionError(f"{path} holds {name} in the unknown dtype {entry['dtype']}")
        if any(not isinstance(length, int) or length < 0 for length in entry["shape"]):
            raise ConversionError(f"{path} holds {name} in the shape {entry['shape']}")
        start, stop = entry["data_offsets"]
        if start != end or stop - start != math.prod(entry["shape"]) * DTYPE_BYTES[entry["dtype"]]:
            raise ConversionError(f"{path} is damaged: {name} does not lie where it should")
        end = stop
    return end


def copy_tensors(shard: Shard, names: Iterable[str], target: Path) -> None:
    """Write some of a shard's tensors, unchanged, as a file of their own."""
    ordered = _in_order(shard, names)
    with target.open("wb") as copy:
        _copy_tensors(shard, ordered, copy)


def load_tensors(shard: Shard, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Read some of a shard's tensors into memory."""
    ordered = _in_order(shard, names)
    buffer = BytesIO()
    _copy_tensors(shard, ordered, buffer)
    return load(buffer.getvalue())


def rewrite_tensors(
    shard: Shard,
    changed: Iterable[str],
    change: Callable[[str, torch.Tensor], torch.Tensor],
    target: Path,
) -> None:
    """Write a shard's tensors as a file of their own, some of them changed.

    One changed tensor at a time is in memory, and of the others none.

    Args:
        changed: names of tensors to change.
        change: makes of a tensor's name and value what is written, of the same shape and dtype.
        target: file to write.
    """
    changed = set(changed)
    ordered = _in_order(shard, shard.tensors)
    with target.open("wb") as copy, shard.path.open("rb") as source:
        _write_header(shard, ordered, copy)
        for name in ordered:
            if name in changed:
                value = change(name, load_tensors(shard, [name])[name])
                copy.write(value.contiguous().flatten().view(torch.uint8).numpy())
            else:
                _copy_tensor(shard, name, source, copy)


def _copy_tensors(shard: Shard, ordered: list[str], copy: BinaryIO) -> None:
    _write_header(shard, ordered, copy)
    with shard.path.open("rb") as source:
        for name in ordered:
            _copy_tensor(shard, name, source, copy)


def _in_order(shard: Shard, names: Iterable[str]) -> list[str]:
    """Names of tensors as they follow each other in the file."""
    return sorted(names, key=lambda name: shard.tensors[name]["data_offsets"])


def _write_header(shard: Shard, ordered: list[str], copy: BinaryIO) -> None:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        start, stop = shard.tensors[name]["data_offsets"]
        header[name] = shard.tensors[name] | {"data_offsets": [end, end + stop - start]}
        end += stop - start
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    copy.write(len(encoded).to_bytes(LENGTH_BYTES, "little") + encoded)


def _copy_tensor(shard: Shard, name: str, source: BinaryIO, copy: BinaryIO) -> None:
    start, stop = shard.tensors[name]["data_offsets"]
    source.seek(shard.data_start + start)
    _copy_bytes(source, copy, stop - start)


def _copy_bytes(source: BinaryIO, copy: BinaryIO, count: int) -> None:
    while count > 0:
        block = source.read(min(count, COPY_BYTES))
        copy.write(block)
        count -= len(block)
        if not block:
            raise ConversionError(f"{source.name} became shorter while it was read")
