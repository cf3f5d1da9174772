"""Safetensors shards that are copied under new tensor names without loading a tensor.

A safetensors file is a length, a JSON header (name, dtype, shape and place of every tensor) and the
tensors' bytes. Renaming touches the header only, so the bytes are streamed from file to file and a
conversion needs the same little memory for a model of any size.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LENGTH_BYTES = 8
ALIGNMENT = 8
COPY_BYTES = 16 * 2**20
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class ConversionError(ValueError):
    """The given files cannot be converted; the message says which one and why."""


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
        ConversionError: naming the file that is missing, truncated or no safetensors file.
    """
    if not (folder / INDEX_FILE).exists():
        if not (folder / SINGLE_FILE).exists():
            raise ConversionError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
        return [read_shard(folder / SINGLE_FILE)]
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not weight_map:
        raise ConversionError(f"{folder / INDEX_FILE} has no weight_map")
    return [read_shard(folder / name) for name in dict.fromkeys(weight_map.values())]


def read_shard(path: Path) -> Shard:
    """Read a safetensors header and check that the file holds what it announces.

    Raises:
        ConversionError: when the file is missing, truncated or no safetensors file.
    """
    if not path.is_file():
        raise ConversionError(f"shard {path} is missing")
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
        data_start = LENGTH_BYTES + header_bytes
        if data_start > size:
            raise ConversionError(f"{path} is truncated or not a safetensors file")
        try:
            tensors = json.loads(file.read(header_bytes))
            tensors.pop("__metadata__", None)
            shard = Shard(path, tensors, data_start)
            announced = data_start + shard.data_bytes
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ConversionError(f"{path} is not a safetensors file") from error
    if size != announced:
        raise ConversionError(
            f"{path} is truncated or damaged: {size} bytes where its header announces {announced}"
        )
    return shard


def copy_shard(shard: Shard, names: Mapping[str, str], target: Path) -> None:
    """Write a shard's tensors, unchanged, under the names that `names` gives to each of them."""
    header = {names[name]: entry for name, entry in shard.tensors.items()}
    encoded = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    with shard.path.open("rb") as source, target.open("wb") as copy:
        copy.write(len(encoded).to_bytes(LENGTH_BYTES, "little") + encoded)
        source.seek(shard.data_start)
        shutil.copyfileobj(source, copy, COPY_BYTES)
