"""trl's trainers, which call the backbone: each row's tokens are chosen by its prompt alone."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", minversion="1.16", reason="trl comes with Python 3.11")

from datasets import Dataset, Image
from torch.nn.functional import logsigmoid
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from glimpseprune.cli import main
from glimpseprune.package_files import SAMPLE_PAGE, TINY_MODEL
from glimpseprune.training.base import load_for_training
from glimpseprune.training.prompt_lengths import PromptLengthCollator, prompt_lengths

PAGE = Path(__file__).parents[1] / "docs" / "train.md"
QUESTIONS = [
    ("What is the value of CS?", "4", "173"),
    ("Which of the labels in the page is larger, CS or KP?", "KP", "CS"),
    ("How many labels are red?", "29", "7 7 7"),
]
QUIET = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": "none"}
# Losses are of a few tokens, each near 10; float32 sums of other lengths differ by some 1e-6 each.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def loaded():
    model, processor, _ = load_for_training(str(TINY_MODEL))
    return model, processor


@pytest.fixture
def trainer(loaded, tmp_path):
    """Makes trainers on three questions about the sample page, in one batch of ragged rows."""

    def make(trainer_class, config_class, columns, collator=PromptLengthCollator, **arguments):
        model, processor = loaded
        image = {"image": str(SAMPLE_PAGE)}
        rows = [image | columns(*question) for question in QUESTIONS]
        settings = QUIET | arguments.pop("settings", {})
        config = config_class(
            str(tmp_path / "run"), per_device_train_batch_size=len(rows), **settings
        )
        dataset = Dataset.from_list(rows).cast_column("image", Image())
        made = trainer_class(
            model, args=config, train_dataset=dataset, processing_class=processor, **arguments
        )
        made.data_collator = collator(made.data_collator)
        return made

    return make


def supervised(question: str, answer: str, wrong: str) -> dict:
    return {"prompt": said("user", question), "completion": said("assistant", answer)}


def preferred(question: str, answer: str, wrong: str) -> dict:
    answers = {"chosen": said("assistant", answer), "rejected": said("assistant", wrong)}
    return {"prompt": said("user", question)} | answers


def said(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def only_batch(trainer) -> dict:
    (batch,) = trainer.get_train_dataloader()
    return dict(batch)


@torch.no_grad()
def scores_of_rows(model, batch: dict, completions: torch.Tensor) -> list[torch.Tensor]:
    """Log-probabilities of each row's completion, with the mask that its prompt alone chooses.

    Args:
        completions: `(batch, length)` bool.
    """
    model = model.eval()
    patches = batch["image_grid_thw"].prod(1).tolist()
    pixels, scores, answers_choose = batch["pixel_values"].split(patches), [], []
    for row, completion in enumerate(completions):
        real = batch["attention_mask"][row].bool()
        prompt = real & ~completion
        assert prompt.sum() + completion.sum() == real.sum()
        image = {"pixel_values": pixels[row], "image_grid_thw": batch["image_grid_thw"][row, None]}
        whole, asked = ({**image, **tokens_of(batch, row, part)} for part in (real, prompt))
        keep = model.glimpse(**asked).keep_mask
        answers_choose.append(not torch.equal(model.glimpse(**whole).keep_mask, keep))
        length = int(prompt.sum())
        logits = model(**whole, visual_keep_mask=keep, prompt_length=length).logits[0]
        ids = whole["input_ids"][0, length:, None]
        scores.append(logits[length - 1 : -1].log_softmax(-1).gather(-1, ids)[:, 0])
    assert any(answers_choose)  # so that these figures tell
    return scores


def tokens_of(batch: dict, row: int, part: torch.Tensor) -> dict:
    names = [n for n in ("input_ids", "attention_mask", "mm_token_type_ids") if n in batch]
    return {name: batch[name][row, None, part] for name in names}


@pytest.mark.parametrize("evaluating", [False, True])
def test_a_supervised_loss_is_that_of_its_rows(trainer, evaluating):
    made = trainer(SFTTrainer, SFTConfig, supervised)
    batch = only_batch(made)
    assert len(set(batch["prompt_length"].tolist())) == 3 and not batch["attention_mask"].all()
    scores = scores_of_rows(made.model, batch, batch["labels"] != -100)
    expected = -torch.cat(scores).mean()
    made.model.train(not evaluating)
    if evaluating:
        loss = made.evaluate(made.train_dataset)["eval_loss"]
    else:
        loss = made.compute_loss(made.model, batch).detach()
    torch.testing.assert_close(torch.as_tensor(loss), expected, **TOLERANCE)


def test_a_preference_loss_is_that_of_its_rows(trainer, loaded):
    """Rows chosen and rejected, of one prompt each, and the reference's."""
    reference = copy.deepcopy(loaded[0])
    noise = torch.randn(reference.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    reference.lm_head.weight.data += 0.01 * noise
    made = trainer(DPOTrainer, DPOConfig, preferred, ref_model=reference)
    batch = only_batch(made)
    mask = batch["completion_mask"].bool()
    ours, theirs = (
        torch.stack([score.sum() for score in scores_of_rows(model, batch, mask)])
        for model in (made.model, reference)
    )
    chosen, rejected = (ours - theirs).chunk(2)
    expected = -logsigmoid(made.args.beta * (chosen - rejected)).mean()
    assert abs(expected - math.log(2)) > 1e-3
    loss = made.compute_loss(made.model.train(), batch).detach()
    torch.testing.assert_close(loss, expected, **TOLERANCE)


def test_labels_may_be_taken_away(trainer):
    """As `Trainer` does for label smoothing; trl's collator makes the batches.

    Its loss does not shift the labels of vision-language models, so the logits are looked at.
    """
    settings = {"label_smoothing_factor": 0.1, "remove_unused_columns": False}
    collator = trainer(SFTTrainer, SFTConfig, supervised).data_collator
    made = trainer(Trainer, TrainingArguments, supervised, lambda _: collator, settings=settings)
    batch = only_batch(made)
    scores = torch.cat(scores_of_rows(made.model, batch, batch["labels"] != -100))
    ids, completion = batch["input_ids"][:, 1:, None], batch["labels"][:, 1:] != -100
    _, outputs = made.compute_loss(made.model.train(), batch, return_outputs=True)
    log_probs = outputs.logits[:, :-1].detach().log_softmax(-1).gather(-1, ids)[..., 0]
    torch.testing.assert_close(log_probs[completion], scores, **TOLERANCE)


@pytest.mark.parametrize(
    "trainer_class, config_class, columns",
    [(SFTTrainer, SFTConfig, supervised), (DPOTrainer, DPOConfig, preferred)],
)
def test_training_without_lengths_is_refused(trainer, loaded, trainer_class, config_class, columns):
    reference = {"ref_model": copy.deepcopy(loaded[0])} if trainer_class is DPOTrainer else {}
    made = trainer(trainer_class, config_class, columns, lambda collator: collator, **reference)
    with pytest.raises(ValueError, match="give prompt_length"):
        made.compute_loss(made.model.train(), only_batch(made))


def test_a_loss_over_the_prompt_is_refused(trainer):
    settings = {"completion_only_loss": False}
    made = trainer(SFTTrainer, SFTConfig, supervised, settings=settings)
    with pytest.raises(ValueError, match="labels begin at the first token of row"):
        only_batch(made)


def test_a_cut_row_is_all_prompt():
    labels = torch.tensor([[-100, -100, 4, 5], [-100, -100, -100, -100]])
    assert prompt_lengths({"labels": labels}).tolist() == [2, 4]
    masks = {"completion_mask": torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1], [0, 1, 0, 0]])}
    assert prompt_lengths(masks).tolist() == [1, 3, 1]
    assert prompt_lengths({"labels": labels[:1].expand(3, -1)}).tolist() == [2, 2, 2]


def test_a_batch_that_tells_nothing_is_refused():
    with pytest.raises(ValueError, match="neither labels nor a completion_mask, but input_ids"):
        PromptLengthCollator(lambda examples: {"input_ids": examples})([1])


def test_the_pages_example_trains(tmp_path, monkeypatch):
    """What `docs/train.md` shows, as it stands there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub_configs").symlink_to(TINY_MODEL.parent)
    section = PAGE.read_text().split("\n## trl's SFTTrainer and DPOTrainer\n")[1]
    command, code = re.findall(r"```(?:python)?\n(.+?)```", section, re.DOTALL)
    assert main(command.split()[1:]) == 0
    names = {}
    exec(compile(code, str(PAGE), "exec"), names)
    for trainer in (names["supervised"], names["preferred"]):
        assert trainer.state.global_step == 3
        assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
        weights = dict(trainer.model.named_parameters())
        assert any(weights[name].abs().max() > 0 for name in weights if "lora_B" in name)
        assert not any("glimpse" in name for name, each in weights.items() if each.requires_grad)
    first = json.loads(Path("runs/pages/train.jsonl").read_text().splitlines()[0])
    batch = next(iter(names["supervised"].get_eval_dataloader(names["dataset"].select([0]))))
    answer = batch["input_ids"][0, batch["prompt_length"][0] :]
    assert names["processor"].decode(answer).startswith(first["answer"])
