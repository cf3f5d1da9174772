"""What a call may say beside the arguments of the stock model, and what a pruned prompt refuses."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps

import torch

from .stock import IDLE_ARGUMENTS, NEWEST_TESTED

CALL_SETTINGS = ("prune_threshold", "max_keep_ratio", "min_keep_tokens", "prune_layer")
HIDDEN = ("only_glimpse", "compact_output", "visual_log_keep", "hold")  # not for `generate`


@dataclass
class PruningArguments:
    """Arguments that models and backbones of every family take in `forward`.

    Attributes:
        prune: False runs exactly the stock model.
        prune_threshold, max_keep_ratio, min_keep_tokens, prune_layer: override the configuration
            for one call.
        redundant_patches: leave out, in front of the vision encoder, visual tokens whose neighbours
            predict them within so many grey levels (0 to 255; 0 exactly, for rendered pages);
            overrides the configuration for one call, False for none. For Qwen2.5-VL.
        visual_encode_mask: `(num_visual_tokens,)` bool over the visuals that the call brings, in
            prompt order: the caller's own choice of what is encoded.
        visual_keep_mask: `(num_visual_tokens,)` bool over the batch in prompt order, the caller's
            own choice; no glimpse is taken.
        visual_log_keep: `(num_visual_tokens,)` float, at most 0: a soft mask for training, not for
            `generate`. Every token stays, and the logarithm of its probability to be kept is added
            to the scores of attention to it wherever a dropped token would not be seen: from the
            prompt in layers above K, from the completion in every layer. At 0 and -inf it equals
            the hard mask. Differentiable; no glimpse is taken and no cache returned; for eager and
            sdpa attention.
        prompt_length: tokens before the completion. The prompt is pruned and the completion runs as
            one block over the pruned cache, as when decoding. Default of the whole model: where
            `labels` begin; else, with `logits_to_keep=n` below the length, all but the last n - 1
            tokens are prompt, as in assisted decoding and in trl; else everything is. Where rows
            differ it is a tensor `(batch,)`, padding counted, and no cache is returned.
        in_place: score only: keep every token and let the completion see the glimpse token. Over a
            prefix it takes one that was made with `in_place`.
        only_glimpse: for backbones: stop after layer K; the record is on the returned cache.
        compact_output: for backbones: return kept tokens only, packed to the right, instead of the
            logical layout with zeros at dropped tokens.
        hold: for backbones: stop after layer P's attention and let the returned cache hold the
            prompt, as `look` asks.
    """

    prune: bool | None = None
    prune_threshold: float | None = None
    max_keep_ratio: float | None = None
    min_keep_tokens: int | None = None
    prune_layer: int | None = None
    redundant_patches: float | bool | None = None
    visual_encode_mask: torch.Tensor | None = None
    visual_keep_mask: torch.Tensor | None = None
    visual_log_keep: torch.Tensor | None = None
    prompt_length: int | torch.Tensor | None = None
    in_place: bool = False
    only_glimpse: bool = False
    compact_output: bool = False
    hold: bool = False

    @classmethod
    def take_from(cls, arguments: dict) -> "PruningArguments":
        """Remove what belongs here from keyword arguments."""
        names = [name for name in ARGUMENTS if name in arguments]
        return cls(**{name: arguments.pop(name) for name in names})


ARGUMENTS = tuple(field.name for field in fields(PruningArguments))


def show_pruning_arguments(stock: Callable) -> Callable:
    """Decorate a `forward` that passes most arguments on, so that its signature shows all of them.

    `generate` and `Trainer` read in the signature which arguments a model takes.

    Args:
        stock: the stock class's `forward`, whose arguments are passed on.
    """
    ours = [field for field in fields(PruningArguments) if field.name not in HIDDEN]
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    return show_arguments(
        stock, *(inspect.Parameter(each.name, keyword_only, default=each.default) for each in ours)
    )


def show_arguments(stock: Callable, *more: inspect.Parameter) -> Callable:
    """Decorate a method so that it is called as the stock method is, with `more` behind.

    Its signature shows the stock method's arguments. Those that come by position are handed on by
    the stock method's names.
    """
    parameters = list(inspect.signature(stock).parameters.values())
    takes_any = parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    rest = [parameters.pop()] if takes_any else []
    names = tuple(parameter.name for parameter in parameters[1:])

    def decorate(method: Callable) -> Callable:
        @wraps(method)
        def shown(self, *args, **kwargs):
            if len(args) > len(names):
                raise TypeError(f"{method.__name__} takes {len(names)} arguments, got {len(args)}")
            given = dict(zip(names, args, strict=False))
            if twice := given.keys() & kwargs.keys():
                raise TypeError(f"{method.__name__} got multiple values for {sorted(twice)}")
            return method(self, **given, **kwargs)

        shown.__signature__ = inspect.Signature([*parameters, *more, *rest])
        return shown

    return decorate


def validate_mask(mask: torch.Tensor, num_visual_tokens: int, name: str) -> None:
    """Check a caller's mask over visual tokens.

    Args:
        name: of the argument.

    Raises:
        ValueError: unless it is a bool tensor of shape `(num_visual_tokens,)`.
    """
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        found = getattr(mask, "dtype", type(mask).__name__)
        raise ValueError(f"{name} must be a bool tensor, got {found}")
    if mask.shape != (num_visual_tokens,):
        raise ValueError(
            f"{name} must have shape ({num_visual_tokens},), one entry a visual token of the batch "
            f"in prompt order, got {tuple(mask.shape)}"
        )


def validate_keep_mask(visual_keep_mask: torch.Tensor, num_visual_tokens: int) -> None:
    """As `validate_mask`, of the mask that says what to keep."""
    validate_mask(visual_keep_mask, num_visual_tokens, "visual_keep_mask")


def validate_log_keep(arguments: PruningArguments, num_visual_tokens: int) -> None:
    """Check a caller's soft mask, whose values are not looked at.

    Raises:
        ValueError: unless it is a float tensor of shape `(num_visual_tokens,)` and alone.
    """
    log_keep = arguments.visual_log_keep
    if not isinstance(log_keep, torch.Tensor) or not log_keep.is_floating_point():
        found = getattr(log_keep, "dtype", type(log_keep).__name__)
        raise ValueError(f"visual_log_keep must be a float tensor, got {found}")
    if log_keep.shape != (num_visual_tokens,):
        raise ValueError(
            f"visual_log_keep must have shape ({num_visual_tokens},), one entry a visual token of "
            f"the batch in prompt order, got {tuple(log_keep.shape)}"
        )
    for name in ("visual_keep_mask", "in_place", "only_glimpse"):
        given = getattr(arguments, name)
        if given is not None and given is not False:
            raise ValueError(f"visual_log_keep cannot be combined with {name}")


def refuse_unknown_tensors(arguments: dict) -> None:
    """Refuse tensors, alone or in containers, that a pruned prefill would ignore.

    Args:
        arguments: what is left of a text model's keyword arguments.

    Raises:
        ValueError: naming the argument.
    """
    for name, value in arguments.items():
        if name not in IDLE_ARGUMENTS and _holds_tensors(value):
            raise ValueError(
                f"{name!r} is an argument that a prompt with pruning does not know, so it would be "
                f"ignored (tested with transformers up to {NEWEST_TESTED}): leave it out, or use "
                "prune=False"
            )


def _holds_tensors(value: object) -> bool:
    """Whether it is a tensor, or a dictionary, list or tuple that holds one at any depth."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensors, value))
    return isinstance(value, torch.Tensor)
