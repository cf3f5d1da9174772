"""Time, memory and operations of calls, side by side."""

import re
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker
from transformers import StoppingCriteria

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
STAGES = ("vision", "decoder up to P", "decoder above P", "predictor", "head")


class StepClock(StoppingCriteria):
    """Notes the time at which each token of a generation is there.

    Args:
        clock: returns seconds.

    Attributes:
        seconds: from the start to the first token, then of each decode step.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self.device, self.clock = device, clock
        self.seconds: list[float] = []
        synchronise(device)
        self.last = clock()

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        synchronise(self.device)
        now = self.clock()
        self.seconds.append(now - self.last)
        self.last = now
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def in_turns(calls: dict[str, Callable], repetitions: int) -> dict[str, list]:
    """What each call returns, the calls taken in turns after one warm-up each.

    Taken in turns, what else goes on on the machine meets all of them alike.
    """
    for call in calls.values():
        call()
    results: dict[str, list] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            results[name].append(call())
    return results


@contextmanager
def clocked_module(
    module: nn.Module, device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> Iterator[list[float]]:
    """The seconds of each call of a module inside the context."""
    seconds: list[float] = []

    def start(*args) -> None:
        synchronise(device)
        seconds.append(-clock())

    def stop(*args) -> None:
        synchronise(device)
        seconds[-1] += clock()

    handles = [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def median_ratio(seconds: list[float], others: list[float]) -> float:
    """The median of the ratios of calls that followed one another."""
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of tensors that operations make while it is on.

    What kernels need inside themselves is not seen. Deterministic, on any device.

    Args:
        model: its weights and buffers are not counted.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self.model = model  # its addresses must not be given to others
        weights = [*model.parameters(), *model.buffers()]
        self.known = {weight.untyped_storage()._cdata for weight in weights}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known and storage._cdata not in given:
                self._add(storage)
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def remove() -> None:
            self.now -= size
            self.known.discard(key)

        weakref.finalize(storage, remove).atexit = False


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def peak_bytes(call: Callable, model: nn.Module) -> int:
    """The most memory a call takes beside the weights and its inputs.

    On a GPU what its allocator says; elsewhere `LiveBytes`.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes(model) as live:
        call()
    return live.peak


def cache_bytes(cache: object) -> int:
    """Keys and values that a cache holds."""
    return sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))


def _flash_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    """The CPU's attention kernel, which torch's counter leaves out."""
    return sdpa_flop_count(query, key, value)


CPU_KERNEL = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash_flops}


class _StageCounter(TorchDispatchMode):
    """Adds what torch's counter counts to the stage of the innermost module that runs."""

    def __init__(self, counter: FlopCounterMode, prune_layer: int):
        super().__init__()
        self.counter, self.prune_layer = counter, prune_layer
        self.tracker = ModuleTracker()
        self.stages = dict.fromkeys(STAGES, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = self.counter.get_total_flops()
        output = function(*args, **(kwargs or {}))
        if added := self.counter.get_total_flops() - before:
            innermost = max(self.tracker.parents, key=lambda name: name.count("."))
            self.stages[_stage(innermost, self.prune_layer)] += added
        return output


@torch.no_grad()
def flops_by_stage(call: Callable, prune_layer: int) -> dict[str, int]:
    """Counted operations of a call by stage (`STAGES`), attention without its causal half."""
    with FlopCounterMode(display=False, custom_mapping=CPU_KERNEL) as counter:
        by_stage = _StageCounter(counter, prune_layer)
        with by_stage.tracker, by_stage:
            call()
    return by_stage.stages


def _stage(name: str, prune_layer: int) -> str:
    if found := re.search(r"language_model\.layers\.(\d+)", name):
        layer = int(found[1])
        below = layer < prune_layer or (layer == prune_layer and ".mlp" not in name)
        return "decoder up to P" if below else "decoder above P"
    if "glimpse" in name:
        return "predictor"
    if re.search(r"visual|vision|multi_modal_projector", name, re.IGNORECASE):
        return "vision"
    return "head" if name.endswith("lm_head") else "decoder up to P"
