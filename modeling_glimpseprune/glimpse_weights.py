"""The added weights in a model: their initialisation, and checkpoints that lack them."""

from collections.abc import Iterable

from torch import nn

from .base_weights import located_weights, own_weights
from .glimpse import Glimpse, GlimpseToken
from .importance_predictor import RMSNorm
from .low_rank import ZeroLinear
from .stock import (
    keep_out_of_quantisation,
    lacks_weights,
    mismatched_names,
    stored_buffer,
    warn_if_untested,
)


class GlimpseWeightsMixin:
    """Initialisation of the added weights; a checkpoint that lacks any of them is untrained."""

    def glimpse_module(self) -> Glimpse:
        """The module whose weights are added to the base."""
        raise NotImplementedError

    def post_init(self) -> None:
        """Keep the glimpse on one device and out of quantisation.

        Its maps are small, and what they are worth hangs on small differences.
        """
        glimpse = self.glimpse_module()
        path = next(name for name, module in self.named_modules() if module is glimpse)
        keep_out_of_quantisation(self, path)
        self._no_split_modules = [*(self._no_split_modules or ()), type(glimpse).__name__]
        super().post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs
    ):
        """As the stock method; the base of a glimpse-only repository is fetched.

        Raises:
            ValueError: when the checkpoint holds glimpse weights that its configuration has no
                place for, or lacks low-rank additions that the configuration names.
        """
        warn_if_untested()
        with located_weights(pretrained_model_name_or_path, kwargs) as (source, arguments):
            model, report = super().from_pretrained(
                source, *args, output_loading_info=True, **cls.named_weights(arguments)
            )
        own_weights(model, pretrained_model_name_or_path)
        model.settle_glimpse(report)
        return (model, report) if output_loading_info else model

    @classmethod
    def named_weights(cls, arguments: dict) -> dict:
        """Arguments of `from_pretrained` that know the names of a whole repository's weights."""
        return arguments

    def settle_glimpse(self, report: dict) -> None:
        """Believe the mark `trained` only where every glimpse weight was loaded.

        Args:
            report: what `from_pretrained` says of missing, unexpected and mismatched weights.
        """
        glimpse = self.glimpse_module()
        if unexpected := _of_glimpse(report["unexpected_keys"]):
            raise ValueError(
                f"the checkpoint holds {len(unexpected)} glimpse weights that its configuration "
                f"has no place for, {unexpected[0]} among them: give the configuration's fields as "
                "they were in training"
            )
        missing = _of_glimpse([*report["missing_keys"], *mismatched_names(report)])
        additions = [name for name in missing if "_additions." in name]
        if additions and len(missing) < len(glimpse.state_dict()):
            raise ValueError(
                "the checkpoint lacks low-rank additions that its configuration names "
                f"(glimpse_lora_rank {self.config.glimpse_lora_rank}, stale_rank "
                f"{self.config.stale_rank}), {additions[0]} among them: give the configuration's "
                "fields as they were in training"
            )
        if missing:
            glimpse.declare_untrained()
        else:
            glimpse.trained = stored_buffer(glimpse, "trained").bool()

    def _init_weights(self, module: nn.Module) -> None:
        """Called for fresh modules and, when loading, for those the checkpoint lacks weights of."""
        super()._init_weights(module)
        if isinstance(module, GlimpseToken):
            nn.init.normal_(module.embeddings, std=self.config.get_text_config().initializer_range)
        glimpse = self.glimpse_module()
        if any(module is part for part in glimpse.modules()) and lacks_weights(module):
            if isinstance(module, (RMSNorm, nn.LayerNorm)):  # not every stock class knows norms
                nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)
            if isinstance(module, ZeroLinear):
                nn.init.zeros_(module.weight)


def _of_glimpse(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if ".glimpse." in f".{name}")
