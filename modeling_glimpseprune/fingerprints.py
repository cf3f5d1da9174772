"""What a prefix was made of: which weights, and which pixels."""

import hashlib
from collections.abc import Iterable, Iterator
from weakref import WeakKeyDictionary

import torch
from torch import nn

SAMPLES = 64  # entries of each weight, spread over it

_known: WeakKeyDictionary[nn.Module, tuple[tuple, str]] = WeakKeyDictionary()


def fingerprint(model: nn.Module) -> str:
    """Tell a model's weights and active adapters, by some entries of each weight.

    Computed once for as long as no weight is written to. Of weights that lie on disk only the
    shapes tell.
    """
    weights, adapters = [*model.parameters()], [*_adapters(model.modules())]
    state = (*((weight.data_ptr(), _version(weight)) for weight in weights), *adapters)
    known = _known.get(model)
    if known is None or known[0] != state:
        known = _known[model] = state, _digest(weights, adapters)
    return known[1]


def pixels_hash(pixels: torch.Tensor) -> str:
    """Tell the pixels of one image or video, in bfloat16, whatever they come in."""
    digest = hashlib.sha256(str(tuple(pixels.shape)).encode())
    rounded = pixels.detach().to(torch.bfloat16).contiguous().cpu()
    digest.update(rounded.view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def _digest(weights: list[nn.Parameter], adapters: list[tuple]) -> str:
    digest = hashlib.sha256(repr(adapters).encode())
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for weight in weights:
        digest.update(f"{tuple(weight.shape)} {weight.dtype}".encode())
        if weight.device.type != "meta":
            step = max(1, weight.numel() // SAMPLES)
            samples = weight.detach().reshape(-1)[::step].float()
            by_device.setdefault(weight.device, []).append(samples)
    for samples in by_device.values():
        digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return digest.hexdigest()


def _adapters(modules: Iterable[nn.Module]) -> Iterator[tuple]:
    """Which adapters each layer of peft's runs, and how strongly."""
    for module in modules:
        if hasattr(module, "active_adapters") and hasattr(module, "scaling"):
            scaling = sorted(module.scaling.items())
            yield tuple(module.active_adapters), module.disable_adapters, tuple(scaling)


def _version(weight: torch.Tensor) -> int:
    return 0 if weight.is_inference() else weight._version
