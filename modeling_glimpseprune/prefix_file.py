"""Prefixes as safetensors files."""

import json
import os

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT = "glimpse_prefix 1"


def write_parts(path: str | os.PathLike, tensors: dict[str, torch.Tensor], notes: dict) -> None:
    """Write what a prefix holds; a file that stood there is replaced when the new one is whole.

    Args:
        tensors: by name.
        notes: what JSON can hold.
    """
    partial = f"{os.fspath(path)}.partial"
    copies = {name: each.detach().clone().contiguous() for name, each in tensors.items()}
    save_file(copies, partial, metadata={"format": FORMAT, "notes": json.dumps(notes)})
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
    return tensors, json.loads(metadata["notes"])
