"""The optimisers that train a base."""

from __future__ import annotations

import torch
from torch import nn

from .recipe import Recipe


def optimisers_of(
    model: nn.Module, heads: list[nn.Parameter], recipe: Recipe
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for everything else.

    Raises:
        ValueError: where PyTorch is older than 2.9 and has no Muon.
    """
    try:
        from torch.optim import Muon
    except ImportError:
        raise ValueError(f"training needs torch >= 2.9 for Muon, not {torch.__version__}") from None
    matrices, others, embeddings = [], [], []
    for name, parameter in model.named_parameters():
        inside = parameter.dim() == 2 and "lm_head" not in name
        group = embeddings if "embed_tokens" in name else matrices if inside else others
        group.append(parameter)
    muon = Muon(
        matrices,
        lr=recipe.matrix_rate,
        weight_decay=recipe.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        [
            {"params": [*others, *heads]},
            {"params": embeddings, "lr": recipe.embedding_rate},
        ],
        lr=recipe.other_rate,
        betas=(0.9, 0.98),
        weight_decay=recipe.weight_decay,
    )
    for optimiser in (muon, adamw):
        for group in optimiser.param_groups:
            group["base_rate"] = group["lr"]
    return [muon, adamw]
