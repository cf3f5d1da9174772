"""Load a written repository in a fresh process, and compare its scores with the source's.

The repository is loaded as its users do, with the automatic classes and remote code; the source
(base and glimpse weights, or a training's output) with the classes of this code base. The same
probe, a striped image with a short question, goes through both, on the same machine in the same
dtype, so the scores must agree to the bit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from conversion.prompt_ids import QUESTION, chat_prompt, placeholder
from glimpseprune.families import family_of
from glimpseprune.hub.shards import ConversionError, read_json

HEIGHT, WIDTH = 112, 168
TEXT_LENGTH = 24
ATTENTION = "eager"  # runs everywhere, and in one order of additions


@dataclass(frozen=True)
class Source:
    """What a repository was made from.

    Attributes:
        folder: model folder; a stock base, or a repository of ours that is loaded as it is.
        fields: glimpse fields of the configuration, where `folder` is a stock base.
        weights: glimpse weights by full name, likewise.
    """

    folder: Path
    fields: Mapping[str, object] | None = None
    weights: Mapping[str, torch.Tensor] | None = None


def verifier(source: Source, base: Path) -> Callable[[Path], None]:
    """A `Publication.verify` that compares with `source`.

    Args:
        source: what the repository is made from.
        base: local folder of the base, taken for the one that a glimpse-only repository names.
    """
    return partial(verify, source=source, base=base)


def verify(folder: Path, source: Source, base: Path) -> None:
    """Compare a repository's scores with its source's.

    Raises:
        ConversionError: when one cannot be loaded, or they differ.
    """
    folder, base = folder.absolute(), base.absolute()  # the other processes run elsewhere
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        original = str(source.folder.absolute())
        task = {"role": "source", "folder": original, "processor": str(folder)}
        if source.weights is not None:
            save_file(dict(source.weights), place / "glimpse.safetensors")
            task |= {"weights": str(place / "glimpse.safetensors"), "fields": dict(source.fields)}
        expected = _scores(task, place)
        task = {"role": "repository", "folder": str(folder), "base": str(base)}
        found = _scores(task, place)
    if expected.keys() != found.keys():
        raise ConversionError("the repository does not score what its source scores")
    for name, tensor in expected.items():
        if not torch.equal(tensor, found[name]):
            difference = "their shapes"
            if tensor.shape == found[name].shape:
                difference = f"{(tensor.double() - found[name].double()).abs().max():.3g}"
            raise ConversionError(
                f"the repository's {name} differs from its source's, by {difference}"
            )


def _scores(task: dict, scratch: Path) -> dict[str, torch.Tensor]:
    """Run this file on a task in a fresh process, which looks for packages where this one does."""
    result = scratch / f"{task['role']}.safetensors"
    (scratch / "task.json").write_text(json.dumps(task | {"result": str(result)}))
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    completed = subprocess.run(
        [sys.executable, "-m", "conversion.verification", str(scratch / "task.json")],
        env=os.environ | {"HF_MODULES_CACHE": str(scratch / "modules"), "PYTHONPATH": paths},
        cwd=scratch,
        capture_output=True,
        text=True,
    )
    if completed.returncode != 0:
        last_line = (completed.stderr.strip().splitlines() or ["no message"])[-1]
        what = "source" if task["role"] == "source" else "repository"
        raise ConversionError(f"the {what} cannot be loaded and scored: {last_line}")
    return load_file(result)


def score(task: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """Importance and keep mask of the probe's visual tokens, and the logits that follow.

    Without a processor, the logits of a text alone.
    """
    torch.manual_seed(0)
    model = _load_source(task) if task["role"] == "source" else _load_repository(task)
    model.eval()
    _align(model)
    processor_folder = task.get("processor", task["folder"])
    with torch.no_grad():
        if not (Path(processor_folder) / "tokenizer_config.json").exists():
            ids = torch.arange(1, 1 + TEXT_LENGTH)[None]
            return {"logits": model(input_ids=ids).logits}
        processor = _load_processor(task["role"], processor_folder)
        inputs = probe(processor, model.config).to(model.device)
        record = model.glimpse(**inputs)
        logits = model(**inputs, logits_to_keep=1).logits
    return {
        "importance": record.importance.contiguous(),
        "keep mask": record.keep_mask.contiguous(),
        "logits": logits.contiguous(),
    }


def _align(model: PreTrainedModel) -> None:
    """Move weights that lie in mapped files into memory of their own.

    There they start at any byte, and kernels add in another order than from an aligned start.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def probe(processor: ProcessorMixin, config: PretrainedConfig):
    """A striped image and a question, as model inputs."""
    rows = torch.arange(HEIGHT)[:, None, None]
    columns = torch.arange(WIDTH)[None, :, None]
    channels = torch.arange(3)[None, None, :]
    image = ((rows * 3 + columns * 5 + channels * 60) % 256).to(torch.uint8).numpy()
    if processor.chat_template:
        prompt = chat_prompt(processor)
    else:
        prompt = placeholder(processor, config) + QUESTION
    return processor(images=[image], text=[prompt], return_tensors="pt")


def _load_processor(role: str, folder: str) -> ProcessorMixin:
    """With our class, as when its ids were compared with the base's; the repository's as users."""
    if role == "repository":
        return AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    content = read_json(Path(folder) / "config.json")
    return family_of(content, folder).processor_class.from_pretrained(
        folder, trust_remote_code=False
    )


def _load_source(task: Mapping[str, object]) -> PreTrainedModel:
    content = read_json(Path(task["folder"]) / "config.json")
    family = family_of(content, task["folder"])
    if "weights" not in task:
        return family.model_class.from_pretrained(
            task["folder"], dtype="auto", attn_implementation=ATTENTION
        )
    from conversion.repository import build_config, is_glimpse, validate_config

    config = build_config(content, family, task["fields"])
    del config["glimpse_base"]
    model, loading = family.model_class.from_pretrained(
        task["folder"],
        config=validate_config(config, family),
        key_mapping=dict(family.base_key_map),
        dtype="auto",
        attn_implementation=ATTENTION,
        output_loading_info=True,
    )
    glimpse = {name: tensor for name, tensor in load_file(task["weights"]).items()}
    missing, unexpected = model.load_state_dict(glimpse, strict=False)
    gaps = [name for name in loading["missing_keys"] if not is_glimpse(name)]
    if gaps or unexpected or any(map(is_glimpse, missing)):
        raise ConversionError("base and glimpse weights do not make up a whole model")
    return model


def _load_repository(task: Mapping[str, object]) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(task["folder"], trust_remote_code=True)
    if not config.glimpse_base["included"]:
        config.glimpse_base |= {"repository": task["base"], "revision": None}
    model, loading = AutoModelForImageTextToText.from_pretrained(
        task["folder"],
        config=config,
        trust_remote_code=True,
        dtype="auto",
        attn_implementation=ATTENTION,
        output_loading_info=True,
    )
    faults = [name for kind in ("missing_keys", "unexpected_keys") for name in loading[kind]]
    if faults or loading["mismatched_keys"]:
        raise ConversionError(f"weights do not fit: {faults or loading['mismatched_keys']}")
    if not type(model).__module__.startswith("transformers_modules"):
        raise ConversionError(f"{type(model).__module__} is not the repository's code")
    return model


def main(argv: list[str] | None = None) -> None:
    """Score one task: the part of `verify` that runs in a fresh process."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("task", type=Path)
    task = read_json(parser.parse_args(argv).task)
    save_file(score(task), task["result"])


if __name__ == "__main__":
    main()
