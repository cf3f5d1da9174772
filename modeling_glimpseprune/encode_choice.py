"""What of a call's visuals the vision encoder is to see."""

from dataclasses import dataclass

import torch

ENCODE_ARGUMENTS = ("redundant_patches", "visual_encode_mask")
NONE_BEHIND = (
    "redundant_patches and visual_encode_mask are for visuals behind the prefix, and there are "
    "none: give them to look"
)


@dataclass(frozen=True)
class EncodeChoice:
    """What of a call's visuals to encode.

    Attributes:
        tolerance: grey levels within which neighbours predict a token that is left out, or None.
        mask: `(N,)` bool over all visuals of the call in prompt order, the caller's own choice.
    """

    tolerance: float | None = None
    mask: torch.Tensor | None = None

    @property
    def is_all(self) -> bool:
        """Whether everything is encoded."""
        return self.tolerance is None and self.mask is None

    def by_kind(
        self, kinds: list[str], input_ids: torch.LongTensor | None, config: object
    ) -> dict[str, torch.Tensor]:
        """The caller's mask, parted by kinds of visuals.

        Args:
            kinds: of the visuals given.
            input_ids: `(batch, length)` of their prompts, where known.
            config: has the ids of the placeholders.

        Raises:
            ValueError: when there are several kinds and nobody knows in which order.
        """
        if self.mask is None or not kinds:
            return {}
        if len(kinds) == 1:
            return {kinds[0]: self.mask}
        if input_ids is None:
            raise ValueError(
                "visual_encode_mask over images and videos together needs input_ids, which tell "
                "their order"
            )
        tokens = {kind: getattr(config, f"{kind}_token_id") for kind in kinds}
        flat = input_ids.flatten()
        flat = flat[torch.isin(flat, flat.new_tensor([*tokens.values()]))]
        if self.mask.shape != flat.shape:
            return {kind: self.mask for kind in kinds}  # refused where it is held against one
        return {
            kind: self.mask[(flat == token).to(self.mask.device)] for kind, token in tokens.items()
        }
