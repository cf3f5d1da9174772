"""`release_writer.py FOLDER` writes repositories with the installed release of transformers.

For each family of `NAMES` one by a conversion of a base as published, and one as training leaves
it. Beside each lies what this release makes of it: ids of prompts, and logits of a text.
"""

import json
import sys
from pathlib import Path

import llava_base
import numpy as np
import official_checkpoint
import torch
from conftest import FAMILIES

from conversion.convert_official import convert
from conversion.repository import write_repository as write_converted
from glimpseprune.training.base import load_for_training
from glimpseprune.training.repository import write_repository as write_trained

NAMES = ("qwen2_5_vl", "llava", "llava_next")  # of Qwen3-VL see test_qwen3_vl.py
PICTURE = np.zeros((40, 30, 3), np.uint8)
QWEN_PROMPTS = ("<|vision_start|><|image_pad|><|vision_end|> What is here?", "Who  is\n\nhere?")
GLIMPSE = {"vision_layers": [1, 0]} | llava_base.GLIMPSE


def write_all(folder: Path) -> None:
    for name in NAMES:
        classes = FAMILIES[name]
        base = folder / f"{name}-base"
        if name == "qwen2_5_vl":
            official_checkpoint.write_base(base)
            official = official_checkpoint.write_official(folder / "official")
            convert(base, official, folder / f"{name}-converted")
        else:
            models = llava_base.build_base(name)
            llava_base.write_base(base, name, models.stock)
            fields, weights = llava_base.glimpse_of(models.pruned)
            write_converted(folder / f"{name}-converted", base, classes.family, fields, weights)
        model, processor, dtype = load_for_training(str(base), GLIMPSE)
        model.model.glimpse.trained.fill_(True)
        write_trained(model, processor, folder / f"{name}-trained", dtype, {})
        for repository in folder.glob(f"{name}-[ct]*"):
            describe(repository, name, classes.family)


def describe(repository: Path, name: str, family) -> None:
    model = family.model_class.from_pretrained(repository).eval()
    processor = family.processor_class.from_pretrained(repository, trust_remote_code=False)
    prompts = QWEN_PROMPTS if name == "qwen2_5_vl" else llava_base.PROMPTS
    ids = {}
    for prompt in prompts:
        images = [PICTURE] if processor.image_token in prompt else None
        ids[prompt] = list(processor(text=[prompt], images=images)["input_ids"][0])
        if name != "qwen2_5_vl":
            places = ids[prompt].count(processor.image_token_id)
            assert ids[prompt] == llava_base.expected_ids(prompt, places), (repository, prompt)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(10, 30)[None]).logits
    content = {"image_token": processor.image_token, "ids": ids, "logits": logits.tolist()}
    (repository / "expected.json").write_text(json.dumps(content))


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
