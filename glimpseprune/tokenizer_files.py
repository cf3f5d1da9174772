"""Tokenizers that transformers reads as their file says, whatever class the base names.

Published LLaVA bases name LlamaTokenizer. transformers 4.57 reads their `tokenizer.json` as it
stands; later releases of transformers 5 do so too, because they ignore the name for these model
types. They believe the same name of a repository of ours, and then build a tokenizer by other
rules, whose ids differ behind images. The name of the general class has one meaning everywhere.
"""

from transformers import PreTrainedTokenizerFast

GENERAL_CLASS = "PreTrainedTokenizerFast"
TOKENIZERS_BACKEND = "TokenizersBackend"  # its name in transformers 5, which 4.57 does not know
# What the general class lacks of those for decoders.
DECODER_SETTINGS = {"padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]}


def name_general_class(config: dict) -> dict:
    """The content of a `tokenizer_config.json` that has `tokenizer.json` read as it stands."""
    return DECODER_SETTINGS | config | {"tokenizer_class": GENERAL_CLASS}


def read_as_filed(source: str) -> PreTrainedTokenizerFast:
    """The tokenizer in the `tokenizer.json` of a folder or Hub repository."""
    return PreTrainedTokenizerFast.from_pretrained(source, **DECODER_SETTINGS)
