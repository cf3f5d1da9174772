"""A prefix taken apart into named tensors, for other devices and for files."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .held_prompt import HeldPrompt
from .pruned_cache import MARKS, ROW_MARKS, PrunedLayer
from .shared_layer import SharedLayer
from .visual_tokens import VisualTokens

HELD_TENSORS = ("states", "position_ids", "rows", "order")
ADDED = "additions."  # and a layer
TOKEN_TENSORS = ("rows", "columns", "geometry", "item_rows", "grids", "feature_index", "encoded")


@dataclass
class PrefixOrigin:
    """What a prefix was made of, which prompts that begin with it are held against.

    Attributes:
        input_ids: `(held rows, length)` on the host.
        attention_mask: `(held rows, length)` bool on the host.
        pixels: for each held row the hash of each visual, by the column of its first placeholder.
        made_by: the fingerprint of the model.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    pixels: list[dict[int, str]]
    made_by: str

    def select_rows(self, rows: list[int]) -> "PrefixOrigin":
        """The origin of some of the rows."""
        pixels = [self.pixels[row] for row in rows]
        return PrefixOrigin(self.input_ids[rows], self.attention_mask[rows], pixels, self.made_by)


def to_parts(
    layers: Sequence[PrunedLayer], held: HeldPrompt, origin: PrefixOrigin
) -> tuple[dict[str, torch.Tensor], dict]:
    """What a prefix holds, as named tensors and notes that JSON can hold."""
    first, tokens = layers[0], held.tokens
    tensors = {name: getattr(first, name) for name in ROW_MARKS}
    for index, layer in enumerate(layers):
        if isinstance(layer, SharedLayer):
            tensors |= dict(zip(_names_of_layer(index), layer.held, strict=True))
    tensors |= {name: getattr(held, name) for name in HELD_TENSORS}
    tensors |= {f"{ADDED}{layer}": each for layer, each in held.additions.items()}
    tensors |= {f"tokens.{name}": getattr(tokens, name) for name in TOKEN_TENSORS}
    tensors |= {f"features.{index}": each for index, each in enumerate(tokens.features)}
    tensors |= {"input_ids": origin.input_ids, "mask": origin.attention_mask}
    notes = {name: getattr(first, name) for name in MARKS} | {
        "layers": len(layers),
        "prune_layer": held.prune_layer,
        "left_out": held.dropped,
        "in_place": held.in_place,
        "features": len(tokens.features),
        "kinds": tokens.kinds,
        "sizes": tokens.sizes,
        "pixels": [[*of_row.items()] for of_row in origin.pixels],
        "made_by": origin.made_by,
    }
    return {name: each for name, each in tensors.items() if each is not None}, notes


def of_parts(
    tensors: dict[str, torch.Tensor], notes: dict
) -> tuple[list[PrunedLayer], HeldPrompt, PrefixOrigin]:
    """What `to_parts` took apart."""
    rows, item_rows = tensors["rows"].cpu(), tensors["tokens.item_rows"]
    layers = []
    for index in range(notes["layers"]):
        layer, names = PrunedLayer(), _names_of_layer(index)
        if names[0] in tensors:
            layer = SharedLayer(*(tensors[name] for name in names), rows)
        for name in MARKS:
            setattr(layer, name, notes[name])
        for name in ROW_MARKS:
            setattr(layer, name, tensors.get(name))
        layers.append(layer)
    tokens = VisualTokens(
        features=[tensors[f"features.{index}"] for index in range(notes["features"])],
        kinds=notes["kinds"],
        sizes=notes["sizes"],
        **{name: tensors.get(f"tokens.{name}") for name in TOKEN_TENSORS},
    )
    additions = {
        int(name.removeprefix(ADDED)): each
        for name, each in tensors.items()
        if name.startswith(ADDED)
    }
    held = HeldPrompt(
        tensors["states"],
        tensors["position_ids"],
        rows,
        tokens,
        item_rows.tolist(),
        notes["prune_layer"],
        tensors.get("order"),
        notes["left_out"],
        additions,
        notes["in_place"],
    )
    pixels = [{int(column): each for column, each in of_row} for of_row in notes["pixels"]]
    ids, mask = (tensors[name].cpu() for name in ("input_ids", "mask"))
    return layers, held, PrefixOrigin(ids, mask, pixels, notes["made_by"])


def _names_of_layer(index: int) -> tuple[str, str]:
    return f"layers.{index}.keys", f"layers.{index}.values"
