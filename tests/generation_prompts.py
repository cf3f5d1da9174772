"""Families, prompts, glimpses and masks of the tests of generation."""

import random

import pytest
import torch
from conftest import FAMILIES, Batch, has_windows, sees_videos

PROMPTS = {
    "one_image": [[3, (3, 4), 4]],
    "several_images": [[(2, 3), 2, (3, 2), 1, (1, 1), 3]],
    "ragged_batch": [[3, (2, 3), 4], [(4, 4), 2, (1, 2), 5], [2, (3, 3), (2, 2), 1]],
    "batch_with_text_only_row": [[6], [2, (3, 3), 3], [1, (2, 2), (2, 1), 2]],
    "strips_beside_photos": [[1, (9, 1), 2, (2, 3), 3], [(2, 2), (1, 9), 2], [2, (9, 1), 1]],
    "video": [[2, (2, 3, 4), 4]],
    "long_video": [[3], [2, (5, 1, 2), 4]],
    "images_and_videos": [[1, (2, 2), 2, (2, 2, 2), 3], [4, (2, 3, 1), 1, (3, 2), 2]],
}
IMAGE_PROMPTS = [
    "one_image",
    "several_images",
    "ragged_batch",
    "batch_with_text_only_row",
    "strips_beside_photos",
]
FAMILY_NAMES = tuple(FAMILIES)
GLIMPSE_VARIANTS = {
    "default": {},
    "first_layer": {"glimpse_layer": 0},
    "last_layer": {"glimpse_layer": 3},
    "log_probabilities": {"attention_scores": "log_probabilities"},
    "two_attention_layers": {"glimpse_layer": 2, "attention_layers": [2, 0]},
    "attention_below": {"glimpse_layer": 3, "attention_layers": [1]},
    "two_tokens": {"num_glimpse_tokens": 2},
    "no_token": {"num_glimpse_tokens": 0},
    "some_embedding_layers": {"glimpse_embedding_layers": [0, 2], "glimpse_layer": 2},
    "layer_norm": {"glimpse_norm": "layer_norm"},
    "windowed": {"predictor_windowed": True},
    "without_vision": {"predictor_use_vision": False},
    "uneven_widths": {
        "predictor_hidden_size": 24,
        "predictor_condition_size": 40,
        "predictor_num_heads": 4,
    },
    "three_taps": {"vision_layers": [2, 0, 1]},
}
QWEN_ONLY = pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"], indirect=True)
ONE, RAGGED = PROMPTS["one_image"], PROMPTS["ragged_batch"]


@pytest.fixture(params=FAMILY_NAMES)
def family(request):
    """Of tests that hold for every family; prompts with videos are for those that see them."""
    callspec = request.node.callspec.params
    prompts, variant = callspec.get("name"), callspec.get("variant")
    if "video" in str(prompts) and not sees_videos(request.param):
        pytest.skip("CLIP sees no videos")
    if variant == "windowed" and not has_windows(request.param):
        pytest.skip("its vision encoder has no windows")
    return request.param


def random_prompts(chance: random.Random) -> list[list]:
    """One to three prompts with up to three images each; the first has one at least."""
    prompts = []
    for row in range(chance.randint(1, 3)):
        parts = [chance.randint(0, 4)]
        for _ in range(chance.choice([0, 1, 1, 2, 3]) if row else chance.randint(1, 3)):
            parts += [(chance.randint(1, 3), chance.randint(1, 4)), chance.randint(0, 3)]
        prompts.append([*parts, chance.randint(1, 4)])
    return prompts


def random_mask(chance: random.Random, count: int) -> torch.Tensor:
    """`(count,)` bool: all, none, one, or each token by its own luck."""
    kind = chance.choice(["all", "none", "one", "some", "some", "some"])
    if kind == "one" and count:
        return torch.arange(count) == chance.randrange(count)
    share = {"all": 1.0, "none": 0.0}.get(kind, chance.random())
    return torch.tensor([chance.random() < share for _ in range(count)], dtype=torch.bool)


def random_keep(batch: Batch, seed: int = 0, share: float = 0.4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch.num_visual, generator=generator) < share
