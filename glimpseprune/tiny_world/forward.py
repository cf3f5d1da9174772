"""The language model's pass over packed sequences, and what a training wants to know of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

from .packing import PackedBatch


def answer_figures(
    model: nn.Module,
    packed: PackedBatch,
    visual_tokens: torch.Tensor,
    page_from_layer: int = 0,
    kinds: Sequence[str] = (),
    by_question: bool = False,
) -> dict[str, torch.Tensor]:
    """Answer loss and share of questions with every answer token right, teacher forced.

    `visual_tokens` is `(visual tokens of all pages, width)`, in the order of the placeholders;
    with the `kinds` of the questions, page by page, accuracies of each kind come along. The loss
    is averaged over answer tokens, or `by_question` over questions, whose answers differ in length.
    """
    hidden = packed_hidden_states(model, packed, visual_tokens, page_from_layer)
    wanted = packed.labels != -100
    logits = model.lm_head(hidden[wanted]).float()
    labels = packed.labels[wanted]
    question = (packed.block + 10_000 * torch.arange(len(packed.block))[:, None])[wanted]
    _, number = question.unique(return_inverse=True)
    hits = (logits.argmax(-1) == labels).float()
    right = torch.ones(int(number.max()) + 1).scatter_reduce(0, number, hits, "amin")
    losses = functional.cross_entropy(logits, labels, reduction="none")
    if by_question:
        losses = losses / torch.bincount(number)[number] * (len(number) / len(right))
    by_kind = {
        f"accuracy_of_{kind}": right[torch.tensor([each == kind for each in kinds])].mean()
        for kind in sorted(set(kinds))
    }
    return {
        "answer_loss": losses.mean(),
        "token_accuracy": hits.mean(),
        "accuracy": right.mean(),
    } | by_kind


def packed_hidden_states(
    model: nn.Module, packed: PackedBatch, visual_tokens: torch.Tensor, page_from_layer: int = 0
) -> torch.Tensor:
    """The language model's last hidden states `(batch, length, width)` of packed sequences.

    In layers below `page_from_layer` no text sees the image; visual tokens see one another.
    """
    language_model = model.model.language_model
    embeddings = language_model.embed_tokens(packed.input_ids)
    images = (packed.input_ids == model.config.image_token_id)[..., None]
    embeddings = embeddings.masked_scatter(images, visual_tokens.to(embeddings.dtype))
    mask = _added_mask(packed.visible, embeddings.dtype)
    text_on_image = (~images & images.transpose(1, 2))[:, None]
    low_mask = _added_mask(packed.visible & ~text_on_image, embeddings.dtype)
    with _masks_of_layers(language_model.layers[:page_from_layer], low_mask):
        return language_model(
            inputs_embeds=embeddings,
            position_ids=packed.position_ids,
            attention_mask={"full_attention": mask},
            use_cache=False,
        ).last_hidden_state


@contextmanager
def kept_states(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """A list that gets the layer's states `(batch, length, width)` while the context lasts."""
    states: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    hook = layer.register_forward_hook(keep)
    try:
        yield states
    finally:
        hook.remove()


def _added_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    mask = torch.zeros(visible.shape, dtype=dtype)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)


@contextmanager
def _masks_of_layers(layers: Iterable[nn.Module], mask: torch.Tensor) -> Iterator[None]:
    """Give the decoder layers a mask of their own while the context lasts."""

    def replace_mask(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**kwargs, "attention_mask": mask}

    hooks = [layer.register_forward_pre_hook(replace_mask, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
