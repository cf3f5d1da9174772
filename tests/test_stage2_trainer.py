"""Stage 2: exact scores, what is trained, rewards, recipes, faults, resuming, merging."""

import json
import math
import re
import subprocess
import sys
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import pytest
import torch
import yaml
from judge_server import judge_server
from safetensors.torch import load_file
from stage2_data import (
    PROMPTS,
    ROWS,
    compare_with_generation,
    config_of,
    history,
    learned,
    share,
    something_to_learn,
)
from transformers import set_seed

from glimpseprune.cli import main
from glimpseprune.loading import REPOSITORY
from glimpseprune.package_files import find_recipe
from glimpseprune.training import rewards
from glimpseprune.training.base import load_for_training
from glimpseprune.training.plus import train_plus
from glimpseprune.training.recipe import read_recipe
from glimpseprune.training.rollout import completion_logits, sample_completions
from glimpseprune.training.run_plot import PLOT
from glimpseprune.training.stage2 import train_stage2
from glimpseprune.training.stage2_config import Lora, Stage2Recipe
from glimpseprune.training.stage2_trainer import NonFiniteLoss, Stage2Trainer
from modeling_glimpseprune.stock import cache_of


@pytest.mark.parametrize("mask", ["model", "evidence", "all"])
def test_training_scores_completions_as_generation_does(loaded, data, mask):
    """Ragged prompts, several completions of each, with the masks of the rollout."""
    model, processor = loaded
    prompts = share(loaded, data, PROMPTS)
    total = sum(prompts.visual_counts)
    if mask != "model":
        keep = torch.arange(total) % 3 == 0 if mask == "evidence" else torch.ones(total).bool()
        prompts = prompts.with_masks(keep)
    set_seed(1)
    used = compare_with_generation(model, prompts, ROWS)
    kept = [int(each.sum()) for each in used.keep_masks]
    assert kept == used.visual_counts if mask == "all" else 0 < sum(kept) < total


def test_rollouts_prune_as_the_model_does_by_itself(loaded, data):
    """The masks are those of `generate`, and the first token's distribution is its own."""
    model, processor = loaded
    prompts = share(loaded, data, PROMPTS)
    config = config_of(model, max_new_tokens=2)
    _, used = sample_completions(model, prompts, ROWS, config)
    own = model.generate(
        **prompts.model_inputs([0, 1, 2]), max_new_tokens=1, return_dict_in_generate=True
    )
    assert torch.equal(torch.cat(used.keep_masks), cache_of(own).glimpse.keep_mask)
    assert used.retention == [
        pytest.approx(visual.retention) for visual in cache_of(own).glimpse.visuals
    ]


def test_samples_follow_the_models_distribution(loaded, data):
    """Frequencies of first and second tokens over many completions of one prompt."""
    model, processor = loaded
    prompts = share(loaded, data, [0])
    rows = [0] * 4000
    set_seed(0)
    config = config_of(model, max_new_tokens=2, temperature=0.7, eos_token_id=None)
    completions, used = sample_completions(model, prompts, rows, config)
    with torch.no_grad():
        logits = completion_logits(
            model, used, rows[:1], completions[:1], torch.ones_like(completions[:1])
        )
    expected = (logits[0, 0] / 0.7).softmax(-1)
    found = torch.bincount(completions[:, 0], minlength=len(expected)) / len(rows)
    assert (expected - found).abs().sum() < 0.5 * expected.sqrt().sum() / math.sqrt(len(rows)) * 2
    assert completions[:, 1].unique().numel() > 1


def test_gradients_with_checkpointing_and_shared_prompts_are_those_without(loaded, data):
    """Checkpointing changes nothing, and sharing a prefill sums what its copies would get."""
    model, processor = loaded
    prompts = share(loaded, data, PROMPTS)
    config = config_of(model, max_new_tokens=3, eos_token_id=None)
    completions, used = sample_completions(model, prompts, ROWS, config)
    mask = torch.ones_like(completions)
    weight = model.model.language_model.layers[0].self_attn.q_proj.weight

    def gradient(parts):
        model.zero_grad()
        for rows in parts:
            chosen = [ROWS[row] for row in rows]
            logits = completion_logits(model, used, chosen, completions[rows], mask[rows])
            log_probs = logits.log_softmax(-1).gather(-1, completions[rows][..., None])
            log_probs.sum().backward()
        return weight.grad.clone()

    model.requires_grad_(True)
    try:
        expected = gradient([[row] for row in range(len(ROWS))])
        shared = gradient([list(range(len(ROWS)))])
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model.model.glimpse.eval()
        checkpointed = gradient([list(range(len(ROWS)))])
    finally:
        model.eval()
        model.gradient_checkpointing_disable()
        model.requires_grad_(False)
    assert expected.abs().max() > 0
    assert torch.allclose(shared, expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(checkpointed, shared, rtol=1e-4, atol=1e-6)


def test_only_the_language_model_is_adapted(make_stage2_recipe, glimpsing):
    recipe = make_stage2_recipe()
    summary = train_stage2(recipe)
    adapter = Path(recipe.output)
    names = set(load_file(adapter / "adapter_model.safetensors"))
    assert names and all(
        name.startswith("base_model.model.model.language_model.layers.") for name in names
    )
    found = {name.split(".")[-3] for name in names}
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert found == linear
    assert json.loads((adapter / "training_summary.json").read_text()) == summary
    assert summary["steps"] == 3 and summary["stage"] == 2
    assert {"reward", "kl", "retention"} <= set(summary["metrics"])
    assert len(history(recipe)) == 3
    assert (recipe.checkpoint_folder / PLOT).read_bytes().startswith(b"\x89PNG")


def test_named_layers_are_those_of_the_language_model_only(loaded):
    model, _ = loaded
    config = Lora(target_modules=["q_proj", "down_proj"]).config(model)
    hits = [name for name, _ in model.named_modules() if re.fullmatch(config.target_modules, name)]
    assert len(hits) == 2 * model.config.get_text_config().num_hidden_layers
    assert all(name.startswith("model.language_model.layers.") for name in hits)
    with pytest.raises(ValueError, match="qkv is no linear layer of the language model"):
        Lora(target_modules=["qkv"]).config(model)


def test_the_policy_learns_what_is_rewarded(make_stage2_recipe, monkeypatch):
    """A reward for every other character makes them frequent."""

    def likes_even(completions, **known):
        return [float(ord(text[0]) % 2 == 0) if text else 0.0 for text in completions]

    monkeypatch.setitem(rewards.REWARDS, "anls", likes_even)
    recipe = make_stage2_recipe(
        **{"rewards": {"anls": 1.0}, "training.max_steps": 16, "training.learning_rate": 0.03,
           "training.per_device_train_batch_size": 24, "training.beta": 0.0,
           "training.max_completion_length": 1, "training.lr_scheduler_type": "constant"}
    )  # fmt: skip
    train_stage2(recipe)
    gained = [entry["reward"] for entry in history(recipe)]
    assert sum(gained[:4]) / 4 < 0.25 and sum(gained[-8:]) / 8 > 0.36


def test_log_probabilities_of_policy_and_reference_start_equal(make_stage2_recipe):
    recipe = make_stage2_recipe(**{"training.max_steps": 1, "training.beta": 0.5})
    train_stage2(recipe)
    assert history(recipe)[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_several_updates_a_round_use_the_rounds_own_masks(make_stage2_recipe):
    """Old log-probabilities are needed then; micro-batches hold shuffled rows of all prompts."""
    settings = {
        "training.per_device_train_batch_size": 4, "training.steps_per_generation": 4,
        "training.num_iterations": 2, "training.max_steps": 4, "training.learning_rate": 0.0,
        "training.beta": 0.1, "training.logging_steps": 1,
    }  # fmt: skip
    recipe = make_stage2_recipe(**settings)
    train_stage2(recipe)
    for entry in history(recipe):  # the ratios are 1 and the references equal
        assert entry["kl"] == pytest.approx(0, abs=1e-6)
        assert entry["clip_ratio/region_mean"] == 0


@pytest.mark.parametrize("mask", ["evidence", "all"])
def test_masks_that_need_no_glimpse_train_a_stock_base(make_stage2_recipe, base, mask):
    recipe = make_stage2_recipe(base=str(base), mask=mask)
    summary = train_stage2(recipe)
    shares = [entry["retention"] for entry in history(recipe)]
    assert all(share == 1 for share in shares) if mask == "all" else max(shares) < 1
    assert summary["steps"] == 3


def test_the_models_own_mask_needs_a_trained_glimpse(make_stage2_recipe, base):
    with pytest.raises(ValueError, match="no trained glimpse to choose masks"):
        train_stage2(make_stage2_recipe(base=str(base)))


def test_rewards_are_weighted_sums(make_stage2_recipe):
    recipe = make_stage2_recipe(
        **{"rewards": {"exact_match": 2.0, "anls": 1, "retention": 0.5}, "training.max_steps": 2}
    )
    train_stage2(recipe)
    for entry in history(recipe):
        parts = {name: entry[f"rewards/{name}/mean"] for name in recipe.rewards}
        expected = sum(recipe.rewards[name] * parts[name] for name in parts)
        assert entry["reward"] == pytest.approx(expected, abs=1e-5)
        assert parts["retention"] == pytest.approx(1 - entry["retention"], abs=1e-5)


def test_reward_functions():
    known = {"completions": ["7", "71", ""], "answer": ["7", "7", "7"], "prompts": [""] * 3}
    assert rewards.exact_match(**known) == [1, 0, 0]
    assert rewards.anls(**known) == [1, 0, 0]
    assert rewards.retention(retention=[0.25, 1.0], **known) == [0.75, 0]


def test_a_judge_rewards(make_stage2_recipe):
    with judge_server(
        lambda message: "0.25" if "Reference answer: 7" in message else "1"
    ) as server:
        judge = {"judge.url": server.url, "judge.model": "stub"}
        recipe = make_stage2_recipe(rewards={"judge": 1.0}, **judge, **{"training.max_steps": 2})
        train_stage2(recipe)
        assert len(server.requests) == 16
    assert {entry["rewards/judge/mean"] for entry in history(recipe)} <= {0.25, 0.625, 1.0}


def test_a_judge_that_goes_down_leaves_a_checkpoint(make_stage2_recipe, capsys):
    replies = cycle("10")
    with judge_server(lambda message: next(replies), []) as server:
        judge = {
            "judge.url": server.url, "judge.model": "stub", "judge.retries": 1,
            "judge.backoff": 0.0, "judge.timeout": 0.2, "judge.concurrency": 1,
        }  # fmt: skip
        recipe = make_stage2_recipe(rewards={"judge": 1.0}, **judge)
        server.plan = [200] * 16 + [503] * 99  # two rounds of eight completions
        with pytest.raises(
            OSError, match="replied 503.*checkpoint-2 is saved: go on with --resume"
        ):
            train_stage2(recipe)
        assert not Path(recipe.output).exists()
        server.plan, server.reply = [], lambda message: "1"
        assert train_stage2(recipe, resume=True)["steps"] == 3


def test_a_loss_that_is_no_number_stops(make_stage2_recipe, monkeypatch):
    original = Stage2Trainer._get_per_token_logps_and_entropies

    def broken(self, *args, **kwargs):
        values, *rest = original(self, *args, **kwargs)
        return (values * float("nan") if self.state.global_step == 1 else values, *rest)

    monkeypatch.setattr(Stage2Trainer, "_get_per_token_logps_and_entropies", broken)
    recipe = make_stage2_recipe()
    with pytest.raises(NonFiniteLoss, match=r"loss is nan at step 2 .*ref_per_token_logps"):
        train_stage2(recipe)
    assert not Path(recipe.output).exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"colour": 1}, "recipe: unknown field colour"),
        ({"training.learnin_rate": 1}, "unknown field training.learnin_rate"),
        ({"training.output_dir": "x"}, "unknown field training.output_dir"),
        ({"lora.rnk": 1}, "unknown field lora.rnk"),
        ({"lora.rank": 0}, "rank must be positive"),
        ({"lora": 3}, "lora must be a mapping"),
        ({"mask": "mine"}, "mask must be one of model, sampled, evidence, all"),
        ({"rewards": {}}, "there must be one at least"),
        ({"rewards": {"blue": 1}}, "unknown reward blue"),
        ({"rewards": {"anls": "1"}}, "weight of anls must be a number"),
        ({"rewards": {"judge": 1}}, "judge: url is missing"),
        ({"judge.url": "http://127.0.0.1"}, "no reward of that name"),
        ({"data": "absent.jsonl"}, "absent.jsonl"),
        ({"base": ""}, "base is missing"),
        ({"training.num_generations": 3}, "num_generations"),
        ({"training.use_vllm": True}, "use_vllm: rollouts run through"),
        ({"training.glimpse_learning_rate": 0.1}, "glimpse_learning_rate takes mask: sampled"),
    ],
)
def test_bad_recipes_end_in_a_sentence(make_stage2_recipe, capsys, overrides, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    content = yaml.safe_load(yaml.safe_dump(make_stage2_recipe().to_dict()))
    for name, value in overrides.items():
        section, dot, key = name.partition(".")
        content[section] = {**content[section], key: value} if dot else value
    path.write_text(yaml.safe_dump(content))
    assert main(["train-stage2", "--recipe", str(path)]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


@contextmanager
def trained_in_parts(make_stage2_recipe, mask):
    """A recipe to be trained with an interruption; then its weights are those of one without."""
    with something_to_learn(mask) as settings:
        settings["training.max_steps"] = 6
        whole, parts = (make_stage2_recipe(name, **settings) for name in ("whole", "parts"))
        train_stage2(whole)
        yield parts
    expected, found = learned(whole), learned(parts)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["model", "sampled"])
def test_resumed_training_equals_uninterrupted_training(make_stage2_recipe, monkeypatch, mask):
    """A run that stops between checkpoints, in its second epoch, ends with the same weights."""
    original = Stage2Trainer._compute_loss

    def stopping(self, *args):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return original(self, *args)

    with trained_in_parts(make_stage2_recipe, mask) as parts:
        monkeypatch.setattr(Stage2Trainer, "_compute_loss", stopping)
        with pytest.raises(KeyboardInterrupt):
            train_stage2(parts)
        monkeypatch.setattr(Stage2Trainer, "_compute_loss", original)
        with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
            train_stage2(parts)
        train_stage2(parts, resume=True)


@pytest.mark.parametrize("into", ["repository", pytest.param("stock", marks=pytest.mark.slow)])
def test_plus_runs_all_three_steps(
    make_stage2_recipe, base, glimpsing, data, tmp_path, capsys, into
):
    """And the merged model computes what base and adapter did together."""
    recipe = make_stage2_recipe("unused")
    path, stage1 = tmp_path / "stage2.yaml", tmp_path / "stage1.yaml"
    content = {name: value for name, value in recipe.to_dict().items() if name != "output"}
    path.write_text(yaml.safe_dump(content | {"stage1_recipe": str(stage1)}))
    glimpse = {"glimpse_layer": 1, "predictor_hidden_size": 16, "predictor_condition_size": 16,
               "predictor_num_heads": 2}  # fmt: skip
    training = {"bf16": False, "use_cpu": True, "max_steps": 1, "disable_tqdm": True}
    stage1.write_text(
        yaml.safe_dump(
            {"glimpse": glimpse, "training": training, "start_text": "A"}
            if into == "stock"
            else {"training": training, "start_text": "A"}
        )
    )
    output = tmp_path / "plus"
    merge_base = ["--merge-base", str(base)] if into == "stock" else []
    assert main(["train-plus", "--recipe", str(path), "--output", str(output), *merge_base]) == 0
    assert f"repository: {output}" in capsys.readouterr().out
    from peft import PeftModel

    model, processor, _ = load_for_training(str(glimpsing))
    adapted = PeftModel.from_pretrained(model, f"{output}.adapter").merge_and_unload()
    plus, _, _ = load_for_training(str(output))
    expected, found = adapted.state_dict(), plus.state_dict()
    changed = [
        name
        for name in expected
        if name in found
        and "glimpse" not in name
        and not torch.allclose(expected[name], found[name], atol=1e-6)
    ]
    assert not changed
    moved = (expected["model.glimpse.token.embeddings"], found["model.glimpse.token.embeddings"])
    assert moved[0].shape == moved[1].shape
    # Stage 1 went on from the repository's glimpse, and drew a fresh one on the stock base.
    near = torch.allclose(*moved, atol=1e-2)
    assert near == (into == "repository")
    with pytest.raises(ValueError, match="is not an empty folder"):
        train_plus(recipe, stage1, output)


def without_boxes(data: Path, folder: Path) -> str:
    """A copy of a file of questions, the first of which has no evidence."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[0]["bboxs"] = []
    for row in rows:
        row["image"] = str(data.parent / row["image"])
    path = folder / "without_boxes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        ({"mask": "model"}, True),
        ({"mask": "all"}, True),
        ({"mask": "evidence"}, False),
        ({"mask": "evidence", "learn_rows_without_boxes": True}, True),
    ],
)
def test_questions_without_evidence(make_stage2_recipe, data, tmp_path, fields, taken):
    """Boxes are needed where masks come from them, and nowhere else."""
    settings = {"data": without_boxes(data, tmp_path), "training.max_steps": 1}
    recipe = make_stage2_recipe(**settings, **fields)
    if taken:
        assert train_stage2(recipe)["steps"] == 1
    else:
        with pytest.raises(ValueError, match="line 1: bboxs is empty"):
            train_stage2(recipe)


def test_plus_refuses_first_what_stage_1_would(make_stage2_recipe, data, tmp_path, monkeypatch):
    def fail(*arguments):
        raise AssertionError("stage 2 ran")

    monkeypatch.setattr("glimpseprune.training.plus.train_stage2", fail)
    stage1, output = tmp_path / "stage1.yaml", tmp_path / "plus"
    stage1.write_text("start_text: A\n")
    recipe = make_stage2_recipe("unused", data=without_boxes(data, tmp_path))
    with pytest.raises(ValueError, match="line 1: bboxs is empty"):
        train_plus(recipe, stage1, output)
    told = make_stage2_recipe("unused", data=recipe.data, learn_rows_without_boxes=True)
    with pytest.raises(AssertionError, match="stage 2 ran"):
        train_plus(told, stage1, output)
    stage1.write_text("start_text: A\nskip_rows_without_boxes: true\n")
    with pytest.raises(AssertionError, match="stage 2 ran"):
        train_plus(recipe, stage1, output)


def test_merge_names_the_next_recipe(make_stage2_recipe, tmp_path, capsys):
    recipe = make_stage2_recipe(stage1_recipe="stage1_tiny")
    train_stage2(recipe)
    output = tmp_path / "merged"
    assert main(["merge", "--adapter", recipe.output, "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert f"train-stage1 --recipe stage1_tiny --base {output}" in said
    assert load_for_training(str(output))[0].model.glimpse.trained
    assert main(["merge", "--adapter", str(tmp_path / "no"), "--output", str(tmp_path / "m")]) == 2
    assert "is no folder here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    ["qwen2_5_vl_3b", "qwen2_5_vl_7b", "qwen3_vl_2b", "qwen3_vl_4b", "qwen3_vl_8b", "llava_1_5_7b"]
    + ["tiny", "tiny_sampled", "tiny_deep"],
)
def test_recipes_can_be_read(name, tmp_path):
    path = REPOSITORY / "recipes" / f"stage2_{name}.yaml"
    given = {"data": "d", "output": str(tmp_path / "o"), "training.bf16": False}
    tiny = name.startswith("tiny")
    given |= {"training.use_cpu": True, "base": "b"} if tiny else {}
    recipe = read_recipe(Stage2Recipe, path, given)
    assert find_recipe(recipe.stage1_recipe).exists()
    if tiny:
        assert recipe.mask == ("sampled" if name == "tiny_sampled" else "model")
        assert recipe.training_config().num_generations == 8
        return
    config, lora = recipe.training_config(), Lora(**recipe.lora)
    assert (lora.rank, lora.alpha, lora.dropout, lora.target_modules) == (32, 64, 0.05, None)
    assert (config.num_generations, config.max_completion_length) == (4, 128)
    assert (config.beta, config.temperature, config.learning_rate) == (0.04, 1.0, 1e-4)
    assert recipe.mask == "evidence" and config.num_train_epochs == 1


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["model", "sampled"])
def test_a_killed_run_resumes_to_the_same_weights(make_stage2_recipe, tmp_path, mask):
    path = tmp_path / "parts.yaml"
    command = [sys.executable, "-m", "glimpseprune.cli", "train-stage2", "--recipe", str(path)]
    with trained_in_parts(make_stage2_recipe, mask) as parts:
        path.write_text(yaml.safe_dump(parts.to_dict()))
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE)
        checkpoint = parts.checkpoint_folder / "checkpoint-4" / "trainer_state.json"
        while not checkpoint.exists() and process.poll() is None:
            pass
        process.kill()
        assert process.wait() == -9 and not Path(parts.output).exists()
        subprocess.run([*command, "--resume"], cwd=REPOSITORY, check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["model", "sampled"])
def test_two_processes_train_together(make_stage2_recipe, tmp_path, mask):
    """Over gloo; policy and reference start equal in both."""
    path = tmp_path / "recipe.yaml"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "glimpseprune.cli", "train-stage2", "--recipe", str(path)]
    with something_to_learn(mask) as settings:
        recipe = make_stage2_recipe(**settings, **{"training.beta": 0.1, "training.max_steps": 2})
        path.write_text(yaml.safe_dump(recipe.to_dict()))
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=300)
    summary = json.loads((Path(recipe.output) / "training_summary.json").read_text())
    assert summary["processes"] == 2 and summary["steps"] == 2
    assert history(recipe)[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert learned(recipe)
