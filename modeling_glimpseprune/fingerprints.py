"""What a prefix was made of: which weights, and which pixels."""

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

SAMPLES = 64  # entries of each weight, spread over it


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Tell a model's weights and active adapters, by some entries of each weight.

    Nothing is remembered, as a weight may be written to unnoticed. Of weights that lie on disk only
    the shapes tell.
    """
    digest = hashlib.sha256(repr([*_adapters(model.modules())]).encode())
    samples: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for weight in model.parameters():
        digest.update(f"{tuple(weight.shape)} {weight.dtype}".encode())
        if weight.device.type != "meta":
            step = max(1, weight.numel() // SAMPLES)
            of_kind = samples.setdefault((weight.device, weight.dtype), [])
            of_kind.append(weight.detach().reshape(-1)[::step])
    for of_kind in samples.values():
        digest.update(_bytes_of(torch.cat(of_kind)))
    return digest.hexdigest()


def pixels_hash(pixels: torch.Tensor) -> str:
    """Tell the pixels of one image or video, in bfloat16, whatever they come in."""
    digest = hashlib.sha256(str(tuple(pixels.shape)).encode())
    digest.update(_bytes_of(pixels.detach().to(torch.bfloat16)))
    return digest.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _adapters(modules: Iterable[nn.Module]) -> Iterator[tuple]:
    """Which adapters each layer of peft's runs, and how strongly."""
    for module in modules:
        if hasattr(module, "active_adapters") and hasattr(module, "scaling"):
            scaling = sorted(module.scaling.items())
            yield tuple(module.active_adapters), module.disable_adapters, tuple(scaling)
