"""What a call may say about pruning, beside the arguments of the stock model."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps

import torch

CALL_SETTINGS = ("prune_threshold", "max_keep_ratio", "min_keep_tokens", "prune_layer")
HIDDEN = ("only_glimpse", "compact_output", "visual_log_keep")  # not for `generate`


@dataclass
class PruningArguments:
    """Arguments that models and backbones of every family take in `forward`.

    Attributes:
        prune: False runs exactly the stock model.
        prune_threshold, max_keep_ratio, min_keep_tokens, prune_layer: override the configuration
            for one call.
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
        in_place: score only: keep every token and let the completion see the glimpse token.
        only_glimpse: for backbones: stop after layer K; the record is on the returned cache.
        compact_output: for backbones: return kept tokens only, packed to the right, instead of the
            logical layout with zeros at dropped tokens.
    """

    prune: bool | None = None
    prune_threshold: float | None = None
    max_keep_ratio: float | None = None
    min_keep_tokens: int | None = None
    prune_layer: int | None = None
    visual_keep_mask: torch.Tensor | None = None
    visual_log_keep: torch.Tensor | None = None
    prompt_length: int | torch.Tensor | None = None
    in_place: bool = False
    only_glimpse: bool = False
    compact_output: bool = False

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


def validate_keep_mask(visual_keep_mask: torch.Tensor, num_visual_tokens: int) -> None:
    """Check a caller's keep mask.

    Raises:
        ValueError: unless it is a bool tensor of shape `(num_visual_tokens,)`.
    """
    if not isinstance(visual_keep_mask, torch.Tensor) or visual_keep_mask.dtype != torch.bool:
        found = getattr(visual_keep_mask, "dtype", type(visual_keep_mask).__name__)
        raise ValueError(f"visual_keep_mask must be a bool tensor, got {found}")
    if visual_keep_mask.shape != (num_visual_tokens,):
        raise ValueError(
            f"visual_keep_mask must have shape ({num_visual_tokens},), one entry a visual token of "
            f"the batch in prompt order, got {tuple(visual_keep_mask.shape)}"
        )


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
