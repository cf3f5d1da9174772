"""Prompts and masks of the tests of generation."""

import pytest
import torch
from conftest import Batch
from test_invariants import PROMPTS

QWEN_ONLY = pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"], indirect=True)
ONE, RAGGED = PROMPTS["one_image"], PROMPTS["ragged_batch"]


def random_keep(batch: Batch, seed: int = 0, share: float = 0.4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch.num_visual, generator=generator) < share
