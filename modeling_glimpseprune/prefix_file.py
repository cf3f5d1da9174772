"""Prefixes as safetensors files."""

import json
import os
import zlib

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT = "glimpse_prefix 3"


def write_parts(path: str | os.PathLike, tensors: dict[str, torch.Tensor], notes: dict) -> None:
    """Write what a prefix holds; a file that stood there is replaced when the new one is whole.

    Args:
        tensors: by name.
        notes: what JSON can hold.
    """
    partial = f"{os.fspath(path)}.partial"
    copies = {name: each.detach().cpu().clone().contiguous() for name, each in tensors.items()}
    metadata = {"format": FORMAT, "notes": json.dumps(notes)}
    metadata["checksum"] = _checksum(copies, metadata["notes"])
    save_file(copies, partial, metadata=metadata)
    os.replace(partial, path)


def read_parts(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict]:
    """Read what `write_parts` wrote, onto the host.

    Raises:
        ValueError: when the file is no prefix or is damaged.
        FileNotFoundError: when there is none.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such prefix: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no prefix: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is no prefix of this release of GlimpsePrune (format "
            f"{metadata.get('format')!r}, expected {FORMAT!r})"
        )
    notes = metadata.get("notes", "")
    if metadata.get("checksum") != _checksum(tensors, notes):
        raise ValueError(f"{path} is damaged: what it holds does not fit its checksum")
    return tensors, json.loads(notes)


def _checksum(tensors: dict[str, torch.Tensor], notes: str) -> str:
    """Of tensors on the host, by name, and notes."""
    found = zlib.crc32(notes.encode())
    for name in sorted(tensors):
        found = zlib.crc32(name.encode(), found)
        found = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), found)
    return f"{found:08x}"
