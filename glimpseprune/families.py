"""The model families: their classes, and how stock checkpoints name their weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

try:
    from transformers.initialization import no_init_weights
except ImportError:  # transformers 4
    from transformers.modeling_utils import no_init_weights

from modeling_glimpseprune.configuration_glimpseprune import (
    GlimpsePruneLlavaConfig,
    GlimpsePruneLlavaNextConfig,
    GlimpsePruneQwen2_5_VLConfig,
    GlimpsePruneQwen3VLConfig,
)
from modeling_glimpseprune.modeling_llava import GlimpsePruneLlavaForConditionalGeneration
from modeling_glimpseprune.modeling_llava_next import GlimpsePruneLlavaNextForConditionalGeneration
from modeling_glimpseprune.modeling_qwen2_5_vl import (
    GlimpsePruneQwen2_5_VLForConditionalGeneration,
)
from modeling_glimpseprune.modeling_qwen3_vl import GlimpsePruneQwen3VLForConditionalGeneration
from modeling_glimpseprune.processing_glimpseprune import (
    GlimpsePruneLlavaNextProcessor,
    GlimpsePruneLlavaProcessor,
    GlimpsePruneQwen2_5_VLProcessor,
    GlimpsePruneQwen3VLProcessor,
)

from .hub.shards import ConversionError

# Patterns of names in stock checkpoints, and what replaces them; the first that fits is applied.
QWEN2_5_VL_NAMES = {
    r"^visual\.": "model.visual.",
    r"^model\.(?!language_model\.|visual\.|glimpse\.)": "model.language_model.",
}
# Published LLaVA checkpoints hang the decoder with its head, the tower and the projector side by
# side; later ones hang them under `model`. The tower's own names are those of transformers 4.
LLAVA_NAMES = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.language_model.",
    r"^vision_tower\.(?!vision_model\.)": "model.vision_tower.vision_model.",
    r"^vision_tower\.": "model.vision_tower.",
    r"^multi_modal_projector\.": "model.multi_modal_projector.",
    r"^image_newline$": "model.image_newline",
    r"^model\.vision_tower\.(?!vision_model\.)": "model.vision_tower.vision_model.",
}

# Relatives of known bases that are not supported, and why.
REFUSED = {
    "qwen3_vl_moe": "its MLPs are mixtures of experts, which do not run over parts of a prompt as "
    "those of the dense Qwen3-VL models (qwen3_vl) do",
}

WHOLE_MODEL_CLASSES = (
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForVision2Seq",
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
        tokenizer_as_filed: whether transformers reads a base's `tokenizer.json` as it stands,
            whatever class the base names for it.
    """

    base_model_type: str
    config_class: type[PretrainedConfig]
    model_class: type[PreTrainedModel]
    processor_class: type[ProcessorMixin]
    base_key_map: dict[str, str]
    tokenizer_as_filed: bool = False

    def stored_name(self, name: str) -> str:
        """A tensor's name in a repository of ours, which every generation of transformers reads.

        It changes names of stock bases, and those of our parameters that differ between
        generations.
        """
        for pattern, replacement in self.base_key_map.items():
            if re.search(pattern, name):
                return re.sub(pattern, replacement, name)
        return name

    def without_storage(self, config: PretrainedConfig) -> PreTrainedModel:
        """A model of names and shapes only, on the meta device."""
        with torch.device("meta"), no_init_weights():
            return self.model_class(config)

    @property
    def auto_map(self) -> dict[str, str]:
        """`module.Class` that each of transformers' automatic classes loads, as for stock models.

        Some releases lack one or the other of the automatic classes.
        """
        whole = dict.fromkeys(WHOLE_MODEL_CLASSES, _reference(self.model_class))
        return {
            "AutoConfig": _reference(self.config_class),
            "AutoModel": _reference(self.model_class.backbone_class),
            **whole,
            "AutoProcessor": _reference(self.processor_class),
        }

    @property
    def model_types(self) -> tuple[str, str]:
        """`model_type` of the stock base and of ours."""
        return self.base_model_type, self.config_class.model_type


def _reference(code: type) -> str:
    return f"{code.__module__.rpartition('.')[2]}.{code.__name__}"


QWEN2_5_VL = Family(
    base_model_type="qwen2_5_vl",
    config_class=GlimpsePruneQwen2_5_VLConfig,
    model_class=GlimpsePruneQwen2_5_VLForConditionalGeneration,
    processor_class=GlimpsePruneQwen2_5_VLProcessor,
    base_key_map=QWEN2_5_VL_NAMES,
)
QWEN3_VL = Family(
    base_model_type="qwen3_vl",
    config_class=GlimpsePruneQwen3VLConfig,
    model_class=GlimpsePruneQwen3VLForConditionalGeneration,
    processor_class=GlimpsePruneQwen3VLProcessor,
    base_key_map={},
)
LLAVA = Family(
    base_model_type="llava",
    config_class=GlimpsePruneLlavaConfig,
    model_class=GlimpsePruneLlavaForConditionalGeneration,
    processor_class=GlimpsePruneLlavaProcessor,
    base_key_map=LLAVA_NAMES,
    tokenizer_as_filed=True,
)
LLAVA_NEXT = Family(
    base_model_type="llava_next",
    config_class=GlimpsePruneLlavaNextConfig,
    model_class=GlimpsePruneLlavaNextForConditionalGeneration,
    processor_class=GlimpsePruneLlavaNextProcessor,
    base_key_map=LLAVA_NAMES,
    tokenizer_as_filed=True,
)
FAMILIES = (QWEN2_5_VL, QWEN3_VL, LLAVA, LLAVA_NEXT)


def family_of(config: Mapping[str, object], source: object) -> Family:
    """The family of a configuration, be it a stock base's or one of ours.

    Args:
        config: content of a `config.json`.
        source: where it is from, for the error message.

    Raises:
        ConversionError: when there is none.
    """
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    if model_type in REFUSED:
        raise ConversionError(
            f"{source} is a {model_type!r} model, which is not supported: {REFUSED[model_type]}"
        )
    known = ", ".join(family.base_model_type for family in FAMILIES)
    raise ConversionError(f"{source} is a {model_type!r} model; known are {known}")
