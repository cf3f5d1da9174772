"""A LLaVA base as published: names of transformers 4, and a tokenizer called LlamaTokenizer.

Its `tokenizer.json` is of the older form: a space goes in front of every stretch of text between
special tokens. A class that builds a Llama tokenizer by its own rules puts it in front of the first
one alone, so what follows an image tells them apart.
"""

import json
from pathlib import Path

import torch
from conftest import FAMILIES, Models, randomise
from llava_prompts import PATCH, PINPOINTS, TILE
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from modeling_glimpseprune.glimpse_fields import GLIMPSE_FIELDS

BOS, EOS, IMAGE, PAD = "<s>", "</s>", "<image>", "<pad>"
WORDS = ("What", "Who", "is", "here", "USER", "ASSISTANT", "7")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# Text around placeholders, where ways to tokenize differ.
PROMPTS = (
    "USER: <image>\nWhat is here? ASSISTANT:",
    "<image>What",
    "<image> What",
    "What<image>  is\n\n7",
    "Who is here?",
    "<image>Wer hört 7°?",
)
GLIMPSE = {
    "glimpse_layer": 1,
    "predictor_hidden_size": 16,
    "predictor_condition_size": 16,
    "predictor_num_heads": 2,
}


def build_tokenizer() -> Tokenizer:
    """Bytes, letters and a few words, with merges."""
    words = ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({letter for word in WORDS for letter in word} | set("▁:?"))
    words += letters
    merges = []
    for word in WORDS:
        parts = list(f"▁{word}")
        while len(parts) > 1:  # from the left, so that a word alone is one token without its space
            at = 1 if len(parts) > 2 else 0
            merge = (parts[at], parts[at + 1])
            parts[at : at + 2] = ["".join(merge)]
            if merge not in merges:
                merges.append(merge)
                words.append("".join(merge))
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<unk>", BOS, EOS, IMAGE, PAD])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 1)]
    )
    return tokenizer


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def write_processor(folder: Path, family: str, **changes) -> None:
    """Tokenizer and processor files as published, which no release of transformers wrote.

    Args:
        changes: of `tokenizer_config.json`.
    """
    tokenizer = build_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": True, "add_eos_token": False, "bos_token": BOS, "eos_token": EOS,
        "legacy": False, "model_max_length": 1000, "pad_token": PAD, "tokenizer_class":
        "LlamaTokenizer", "unk_token": "<unk>", "processor_class": processor_class(family),
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", settings | changes)
    specials = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": "<unk>"}
    write_json(folder / "special_tokens_map.json", specials)
    images = {
        "crop_size": {"height": TILE, "width": TILE}, "do_center_crop": True,
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "resample": 3,
        "rescale_factor": 1 / 255, "size": {"shortest_edge": TILE},
        "processor_class": processor_class(family), "image_processor_type": "CLIPImageProcessor",
    }  # fmt: skip
    if family == "llava_next":
        images |= {
            "image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": PINPOINTS,
            "aspect_ratio_setting": "anyres", "do_pad": True,
        }  # fmt: skip
    write_json(folder / "preprocessor_config.json", images)
    processor = {
        "image_token": IMAGE, "num_additional_image_tokens": 1, "patch_size": PATCH,
        "processor_class": processor_class(family), "vision_feature_select_strategy": "default",
    }  # fmt: skip
    write_json(folder / "processor_config.json", processor)
    write_json(folder / "chat_template.json", {"chat_template": TEMPLATE})


def processor_class(family: str) -> str:
    return {"llava": "LlavaProcessor", "llava_next": "LlavaNextProcessor"}[family]


def build_base(family: str, seed: int = 0) -> Models:
    """A stock model for the tokenizer and ours on its weights, with a trained mark."""
    tokenizer = build_tokenizer()
    ids = {word: tokenizer.token_to_id(word) for word in (BOS, EOS, IMAGE, PAD)}
    classes = FAMILIES[family]

    def fields() -> dict:
        made = classes.config_fields.func(tokenizer.get_vocab_size(), ids[PAD])
        made["image_token_index"] = ids[IMAGE]
        made["text_config"] |= {"bos_token_id": ids[BOS], "eos_token_id": ids[EOS]}
        return made

    stock = classes.stock_class(classes.stock_config_class(**fields())).eval()
    randomise(stock, seed)
    ours = classes.family.model_class(classes.family.config_class(**fields(), **GLIMPSE)).eval()
    ours.load_state_dict(stock.state_dict(), strict=False)
    randomise(ours.model.glimpse, seed + 1)
    ours.model.glimpse.trained.fill_(True)
    return Models(stock, ours)


def write_base(folder: Path, family: str, stock) -> Path:
    """A folder of the stock model under published names, with its processor."""
    folder.mkdir()
    weights = {published_name(name): each.clone() for name, each in stock.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    classes = FAMILIES[family]
    tokenizer = build_tokenizer()
    content = classes.config_fields.func(tokenizer.get_vocab_size(), tokenizer.token_to_id(PAD))
    content |= {"architectures": [classes.stock_class.__name__], "torch_dtype": "float32"}
    content |= {
        "model_type": family, "image_token_index": tokenizer.token_to_id(IMAGE),
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    }  # fmt: skip
    content["text_config"] |= {
        "bos_token_id": tokenizer.token_to_id(BOS), "eos_token_id": tokenizer.token_to_id(EOS)
    }  # fmt: skip
    write_json(folder / "config.json", content)
    write_processor(folder, family)
    return folder


def published_name(name: str) -> str:
    """The name that a parameter has in published checkpoints."""
    name = name.replace("model.language_model.", "language_model.model.")
    name = "language_model.lm_head.weight" if name == "lm_head.weight" else name
    name = name.removeprefix("model.")
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
    return name


def expected_ids(prompt: str, tokens: int) -> list[int]:
    """Ids of a prompt by `tokenizer.json` itself, an image's placeholder taking `tokens` places."""
    return build_tokenizer().encode(prompt.replace(IMAGE, IMAGE * tokens)).ids


def glimpse_of(ours) -> tuple[dict, dict[str, torch.Tensor]]:
    """Configuration fields and weights that a conversion adds."""
    prefix = "model.glimpse."
    state, config = ours.state_dict(), ours.config.to_dict()
    fields = {name: config[name] for name in GLIMPSE_FIELDS if name != "glimpse_base"}
    return fields, {name: state[name] for name in state if name.startswith(prefix)}
