"""The added weights in a model: their initialisation, and checkpoints that lack them."""

from torch import nn

from .base_weights import located_weights, own_weights
from .glimpse import Glimpse, GlimpseToken
from .importance_predictor import RMSNorm
from .low_rank import ZeroLinear
from .stock import lacks_weights, warn_if_untested


class GlimpseWeightsMixin:
    """Initialisation of the added weights; a checkpoint that lacks any of them is untrained."""

    def glimpse_module(self) -> Glimpse:
        """The module whose weights are added to the base."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As the stock method; the base of a glimpse-only repository is fetched.

        Weights that a checkpoint lacks make the glimpse untrained. transformers 4 fills missing
        weights in before it reads the others, `trained` among them.
        """
        warn_if_untested()
        with located_weights(pretrained_model_name_or_path, kwargs) as (source, arguments):
            loaded = super().from_pretrained(source, *args, **arguments)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        own_weights(model, pretrained_model_name_or_path)
        glimpse = model.glimpse_module()
        if glimpse.declared_untrained:
            glimpse.trained.fill_(False)
        return loaded

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
            glimpse.declare_untrained()
