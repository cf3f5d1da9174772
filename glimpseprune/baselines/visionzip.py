"""VisionZip (arXiv 2412.04467): keep what the vision encoder attends to, merge the rest.

Dominant tokens receive the most attention in the encoder's last block with full attention, averaged
over heads and queries. Of the others, evenly spaced ones become contextual tokens: each of the rest
joins the one whose keys are most like its own, and what joined is averaged. 27 of 32 tokens are
dominant, as in the paper's settings. Simplified: features are merged after the projection into the
decoder; kept tokens keep their positions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import normalize
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from modeling_glimpseprune.modeling_qwen2_5_vl import window_order
from modeling_glimpseprune.prune_request import PruneRequest

from .layer_masks import prefill_begun
from .method import Application, Method
from .model_sizes import ModelSizes
from .prompt_tokens import budget_of
from .scorer import drop_before_decoder, keep_highest

DOMINANT_SHARE = 27 / 32


@dataclass(frozen=True)
class VisionZip(Method):
    """Dominant and contextual tokens, chosen before the decoder."""

    name: str = "VisionZip-like"

    @contextmanager
    def applied(self, model, processor, batch) -> Iterator[Application]:
        reading = batch.encoder_reading

        def begin(request: PruneRequest, inputs_embeds: torch.Tensor) -> torch.Tensor:
            tokens = request.tokens
            received, keys = _by_token(model, request, *reading)
            embeddings = inputs_embeds[tokens.rows, tokens.columns]
            counts = batch.visual_counts
            zipped = [
                zip_tokens(*of_prompt, budget_of(len(of_prompt[0]), self.ratio))
                for of_prompt in zip(
                    received.split(counts), keys.split(counts), embeddings.split(counts),
                    strict=True,
                )
            ]  # fmt: skip
            drop_before_decoder(request, torch.cat([keep for keep, _ in zipped]))
            merged = inputs_embeds.clone()
            merged[tokens.rows, tokens.columns] = torch.cat([states for _, states in zipped])
            return merged

        with _encoder_read(model, reading), prefill_begun(model, begin):
            yield Application({"visual_keep_mask": batch.everything}, last_full_layer=-1)

    def look_layer(self, config: PretrainedConfig) -> int | None:
        return None

    @property
    def looks_into_encoder(self) -> bool:
        return True

    def scoring_flops(self, sizes: ModelSizes, visual: int, prompt: int) -> int:
        return 2 * (visual * sizes.patches) ** 2 * sizes.vision_hidden


def zip_tokens(
    received: torch.Tensor, keys: torch.Tensor, embeddings: torch.Tensor, budget: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose and merge the n visual tokens of a prompt.

    Args:
        received: `(n,)` attention that each token receives in the vision encoder.
        keys: `(n, size)` its keys there.
        embeddings: `(n, hidden)`, as the decoder takes them.
        budget: dominant and contextual tokens together.

    Returns:
        `(n,)` bool, True at both kinds, and the embeddings with contextual ones merged.
    """
    contextual = min(budget - round(DOMINANT_SHARE * budget), len(received) - budget)
    keep = keep_highest(received, budget - contextual)
    if contextual <= 0:
        return keep, embeddings
    rest = (~keep).nonzero()[:, 0]
    is_target = torch.zeros(len(rest), dtype=torch.bool, device=rest.device)
    is_target[:: len(rest) // contextual] = True
    is_target &= is_target.cumsum(0) <= contextual
    targets, others = rest[is_target], rest[~is_target]
    directions = normalize(keys.float(), dim=-1)
    joins = (directions[others] @ directions[targets].T).argmax(1)
    sums = embeddings[targets].index_add(0, joins, embeddings[others])
    members = torch.bincount(joins, minlength=contextual)[:, None] + 1
    merged = embeddings.clone()
    merged[targets] = sums / members
    keep[targets] = True
    return keep, merged


@contextmanager
def _encoder_read(model: PreTrainedModel, encoded: list) -> Iterator[None]:
    """Put attention received and keys of each patch into `encoded` when images are encoded."""
    if not model.config.has_vision_windows:
        raise ValueError("the VisionZip-like baseline reads Qwen2.5-VL's vision encoder only")
    visual = model.model.visual
    attention = visual.blocks[visual.config.fullatt_block_indexes[-1]].attn

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        encoded[:] = read_encoder_attention(
            module, states, kwargs["cu_seqlens"], kwargs["position_embeddings"]
        )

    handle = attention.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def read_encoder_attention(
    attention: nn.Module,
    states: torch.Tensor,
    bounds: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each patch receives, and its keys.

    Args:
        attention: a block's attention.
        states: `(patches, width)`, its input.
        bounds: where each image starts, and the end.
        rotary: cosine and sine `(patches, head_dim)`.

    Returns:
        `(patches,)` attention averaged over heads and queries, `(patches, head_dim)` keys averaged
        over heads.
    """
    queries, keys, _ = (
        attention.qkv(states).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
    )  # (patches, heads, head_dim)
    queries, keys = apply_rotary_pos_emb_vision(queries, keys, *rotary)
    received = torch.zeros(len(states), device=states.device)
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        for head in range(attention.num_heads):  # one at a time: memory of one head's attention
            query = queries[start:end, head] * attention.scaling  # before it could overflow
            logits = query @ keys[start:end, head].T
            received[start:end] += logits.float().softmax(-1).mean(0) / attention.num_heads
    return received, keys.mean(1)


def _by_token(
    model: PreTrainedModel, request: PruneRequest, received: torch.Tensor, keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches to tokens in prompt order: attention summed, keys averaged."""
    patches = model.model.visual.spatial_merge_unit
    tokens = request.tokens
    order = window_order(tokens.geometry, tokens.sizes, model.model.predictor_window)
    received = received.view(-1, patches).sum(1)
    keys = keys.view(-1, patches, keys.shape[-1]).mean(1)
    return torch.empty_like(received).index_copy(0, order, received), torch.empty_like(
        keys
    ).index_copy(0, order, keys)
