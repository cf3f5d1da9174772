"""What the conversion knows of each model family."""

from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

from glimpseprune.hub.shards import ConversionError
from glimpseprune.stock_names import LLAVA_NAMES
from modeling_glimpseprune.configuration_glimpseprune import (
    GlimpsePruneLlavaConfig,
    GlimpsePruneLlavaNextConfig,
    GlimpsePruneQwen2_5_VLConfig,
)
from modeling_glimpseprune.modeling_llava import GlimpsePruneLlavaForConditionalGeneration
from modeling_glimpseprune.modeling_llava_next import GlimpsePruneLlavaNextForConditionalGeneration
from modeling_glimpseprune.modeling_qwen2_5_vl import (
    GlimpsePruneQwen2_5_VLForConditionalGeneration,
)
from modeling_glimpseprune.processing_glimpseprune import (
    GlimpsePruneLlavaNextProcessor,
    GlimpsePruneLlavaProcessor,
    GlimpsePruneQwen2_5_VLProcessor,
)


@dataclass(frozen=True)
class Family:
    """One family of bases and the classes that GlimpsePrune adds for it.

    Attributes:
        base_model_type: `model_type` of the stock base.
        config_class, model_class, processor_class: ours; their modules are the remote code.
        base_key_map: regular expression -> replacement that turns the names of published bases
            into those of our model's parameters. The first that matches is applied; a name that
            none matches stays.
    """

    base_model_type: str
    config_class: type[PretrainedConfig]
    model_class: type[PreTrainedModel]
    processor_class: type[ProcessorMixin]
    base_key_map: dict[str, str]

    @property
    def model_types(self) -> tuple[str, str]:
        """`model_type` of the stock base and of ours."""
        return self.base_model_type, self.config_class.model_type


QWEN2_5_VL = Family(
    base_model_type="qwen2_5_vl",
    config_class=GlimpsePruneQwen2_5_VLConfig,
    model_class=GlimpsePruneQwen2_5_VLForConditionalGeneration,
    processor_class=GlimpsePruneQwen2_5_VLProcessor,
    base_key_map={
        r"^visual\.": "model.visual.",
        r"^model\.(?!language_model\.|visual\.|glimpse\.)": "model.language_model.",
    },
)
LLAVA = Family(
    base_model_type="llava",
    config_class=GlimpsePruneLlavaConfig,
    model_class=GlimpsePruneLlavaForConditionalGeneration,
    processor_class=GlimpsePruneLlavaProcessor,
    base_key_map=LLAVA_NAMES,
)
LLAVA_NEXT = Family(
    base_model_type="llava_next",
    config_class=GlimpsePruneLlavaNextConfig,
    model_class=GlimpsePruneLlavaNextForConditionalGeneration,
    processor_class=GlimpsePruneLlavaNextProcessor,
    base_key_map=LLAVA_NAMES,
)
FAMILIES = (QWEN2_5_VL, LLAVA, LLAVA_NEXT)


def family_of(config: dict, folder: object) -> Family:
    """The family of a configuration, be it a stock base's or one of ours.

    Raises:
        ConversionError: when there is none.
    """
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(family.base_model_type for family in FAMILIES)
    raise ConversionError(f"{folder} is a {model_type!r} model; known are {known}")
