"""Files saved by transformers 5, rewritten so that transformers 4.57 reads them as well.

transformers 5 still reads the older layout of all of them, so that is the layout of a repository.
"""

from pathlib import Path

from conversion.shards import read_json, write_json

SUB_PROCESSORS = {
    "image_processor": "preprocessor_config.json",
    "video_processor": "video_preprocessor_config.json",
}


def portable_config(config: dict) -> dict:
    """A model configuration whose text model states rotary embeddings and tied weights as 4.57.

    The configuration of published bases, which is flat, comes back as it is.
    """
    if "text_config" not in config:
        return config
    text_config = dict(config["text_config"])
    rotary = dict(text_config.pop("rope_parameters", None) or {})
    if rotary:
        text_config["rope_theta"] = rotary.pop("rope_theta")
        text_config["rope_scaling"] = rotary
    if "tie_word_embeddings" in config:
        text_config["tie_word_embeddings"] = config["tie_word_embeddings"]
    return config | {"text_config": text_config}


def make_processor_portable(folder: Path) -> None:
    """Split the processors' common file into one a processor, and rename tokenizer fields."""
    common = folder / "processor_config.json"
    if common.exists():
        content = read_json(common)
        for name, file_name in SUB_PROCESSORS.items():
            if name in content:
                write_json(folder / file_name, content.pop(name))
        write_json(common, content)
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.exists():
        content = read_json(tokenizer)
        if isinstance(content.get("extra_special_tokens"), list):
            content["additional_special_tokens"] = content.pop("extra_special_tokens")
            write_json(tokenizer, content)
