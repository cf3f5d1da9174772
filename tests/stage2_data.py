"""What tests of stage 2 train on; importing it skips a module where stage 2 cannot be trained."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

import pytest
import torch

from modeling_glimpseprune.stock import ENCODES_FIRST

if not ENCODES_FIRST:
    pytest.skip("this release does not generate from encoded images", allow_module_level=True)
pytest.importorskip("trl", minversion="1.16", reason="stage 2 trains with trl >= 1.16")

from judge_server import judge_server
from safetensors.torch import load_file
from transformers import GenerationConfig

from glimpseprune.data.visual_cot import read_visual_cot
from glimpseprune.data.visual_cot_collator import VisualCoTCollator
from glimpseprune.training.recipe import read_recipe
from glimpseprune.training.rollout import (
    TEXT_INPUTS,
    SharedPrompts,
    completion_logits,
    sample_completions,
    share_prompts,
)
from glimpseprune.training.stage1 import train_stage1
from glimpseprune.training.stage1_config import Stage1Recipe
from glimpseprune.training.stage2_config import Stage2Recipe

PROMPTS = [0, 3, 4]  # of different lengths, about three images of different sizes
ROWS = [0, 0, 0, 1, 1, 1, 2, 2, 2]


def write_glimpsing(base: Path, data: Path, output: Path) -> Path:
    """A repository whose glimpse counts as trained: random scores, some tokens kept."""
    fields = {
        "base": str(base), "data": str(data), "output": str(output),
        "glimpse.glimpse_layer": 1, "glimpse.predictor_hidden_size": 16,
        "glimpse.predictor_condition_size": 16, "glimpse.predictor_num_heads": 2,
        "glimpse.min_keep_tokens": 2, "glimpse.glimpse_dropout": 0.1,
        "training.bf16": False, "training.use_cpu": True, "training.max_steps": 1,
        "training.disable_tqdm": True, "training.learning_rate": 0.0,
    }  # fmt: skip
    train_stage1(read_recipe(Stage1Recipe, None, fields))
    return output


def stage2_recipe_of(base: Path, data: Path, output: Path, /, **overrides) -> Stage2Recipe:
    """A recipe of three steps; overrides as `read_recipe` takes them."""
    fields = {"base": str(base), "data": str(data), "output": str(output)}
    training = {
        "bf16": False, "use_cpu": True, "learning_rate": 0.01, "num_generations": 4,
        "per_device_train_batch_size": 8, "max_completion_length": 3, "max_steps": 3,
        "logging_steps": 1, "save_steps": 100, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    training = {f"training.{name}": value for name, value in training.items()}
    lora = {"lora.rank": 4, "lora.alpha": 8, "lora.dropout": 0.0}
    return read_recipe(Stage2Recipe, None, fields | training | lora | overrides)


def share(loaded, data, rows) -> SharedPrompts:
    model, processor = loaded
    questions = read_visual_cot(data)
    return share_prompts(model, VisualCoTCollator(processor)([[questions[row] for row in rows]]))


def config_of(model, **settings) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True,
        pad_token_id=model.config.get_text_config().pad_token_id,
        top_k=0,
        **settings,
    )


def history(recipe) -> list[dict]:
    state = sorted(recipe.checkpoint_folder.glob("checkpoint-*/trainer_state.json"))[-1]
    return [each for each in json.loads(state.read_text())["log_history"] if "reward" in each]


def compare_with_generation(model, prompts, rows) -> SharedPrompts:
    """Sampled completions scored together and padded, and each alone while it is generated."""
    config = config_of(model, max_new_tokens=5, eos_token_id=None)
    completions, used = sample_completions(model, prompts, rows, config)
    assert completions.shape == (len(rows), 5) and len(set(map(tuple, completions.tolist()))) > 1
    with torch.no_grad():
        logits = completion_logits(model, used, rows, completions, torch.ones_like(completions))
    found = logits.log_softmax(-1).gather(-1, completions[..., None])[..., 0]
    for row, prompt in enumerate(rows):
        inputs = used.model_inputs([prompt])
        real = inputs["attention_mask"][0].bool()
        for name in TEXT_INPUTS:
            if name in inputs:
                inputs[name] = inputs[name][:, real]
        expected = forced_scores(model, inputs, completions[row])
        assert (found[row] - expected).abs().max() < 1e-4
    return used


def forced_scores(model, inputs, completion) -> torch.Tensor:
    """Log-probabilities that `generate` records when it is made to say the completion."""
    start = inputs["input_ids"].shape[1]
    output = model.generate(
        **inputs,
        max_new_tokens=len(completion),
        do_sample=False,
        eos_token_id=None,
        prefix_allowed_tokens_fn=lambda row, ids: [int(completion[len(ids) - start])],
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert torch.equal(output.sequences[0, start:], completion)
    log_probs = torch.stack(output.logits, dim=1)[0].log_softmax(-1)
    return log_probs.gather(-1, completion[:, None])[:, 0]


@contextmanager
def something_to_learn(mask: str) -> Iterator[dict]:
    """Settings under which each completion has a reward of its own, the same whenever asked."""
    with judge_server(lambda message: str(crc32(message.encode()) % 101 / 100)) as server:
        yield {
            "mask": mask, "rewards": {"judge": 1.0, "retention": 1.0},
            "judge.url": server.url, "judge.model": "stub", "training.save_steps": 2,
        }  # fmt: skip


def learned(recipe) -> dict[str, torch.Tensor]:
    """What a run trained, which was something."""
    files = sorted(Path(recipe.output).glob("*.safetensors"))
    assert len(files) == (2 if recipe.mask == "sampled" else 1)
    weights = {name: weight for file in files for name, weight in load_file(file).items()}
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
    return weights
