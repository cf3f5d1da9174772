"""Stage 1: trains the glimpse token and the visual importance predictor on a frozen base.

Objectives, alone or together, by the weights of `Stage1Config`:

- grounding (paper, section 3.3; weights of the official configuration): importance against evidence
  boxes by Dice and binary cross-entropy, and the answer's cross-entropy with the glimpse token in
  place, where all visual tokens stay. One forward of the model serves all three.
- distillation: the KL divergence from the base's answer distribution to that of the pruned model,
  and a cost for every token kept. Gradients pass through a soft mask, which is noisy and sharpens
  in the course of training; an evaluation measures with the hard mask of the model's own choice.
"""

import logging
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel, Trainer
from transformers.modeling_outputs import ModelOutput

from modeling_glimpseprune.glimpse_prefix import GlimpsePrefix
from modeling_glimpseprune.glimpse_record import GlimpseRecord
from modeling_glimpseprune.selection import corner_tokens
from modeling_glimpseprune.stock import CACHE_NAME, cache_of, given_cache
from modeling_glimpseprune.visual_features import VisualFeatures

from ..data.visual_cot_collator import IGNORED_LABEL, TEXT_INPUTS, repeat_visuals
from .checkpoints import load_glimpse, save_glimpse
from .figure_means import FigureMeans, figures_of
from .late_glimpse import with_backbone
from .pages import Pages, behind_pages
from .soft_mask import annealed, log_keep_probability, logistic_noise
from .stage1_config import Stage1Config, runs_beside
from .stage1_losses import (
    answer_loss,
    distillation_loss,
    located_losses,
    retention_loss,
)

TAUGHT = ("late_loss", "distillation_loss")  # whose teachers see every patch

logger = logging.getLogger(__name__)


class Stage1Trainer(Trainer):
    """A `Trainer` for `model.model.glimpse`; everything else in the model is frozen.

    Checkpoints hold the glimpse weights alone, with the optimiser's, the scheduler's and the random
    generators' states. Beside the loss, its parts and the figures of `mask_figures` are logged, as
    averages over the questions since the last logging, and over all questions of an evaluation.

    Args:
        model: a GlimpsePrune model; its glimpse weights count as trained from now on.
        args: settings.
        late: a backbone over the same base whose glimpse is the teacher, or None.
        kwargs: as `Trainer` takes them. The data collator must be a `VisualCoTCollator`.

    Raises:
        ValueError: as for `Stage1Config.check_glimpse`.
    """

    args: Stage1Config

    def __init__(
        self,
        model: PreTrainedModel,
        args: Stage1Config,
        late: PreTrainedModel | None = None,
        **kwargs,
    ):
        args.check_glimpse(model.config)
        self.runs_beside = runs_beside(model.config)
        model.requires_grad_(False)
        model.model.glimpse.requires_grad_(True)
        freeze_unread_additions(model)
        model.model.glimpse.trained.fill_(True)
        super().__init__(model=model, args=args, **kwargs)
        self.late = late
        if late is not None:
            late.glimpse.to(args.device)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the questions of a batch
        self._figures = {"train": FigureMeans(), "eval": FigureMeans()}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ModelOutput]:
        """The weighted sum of the losses of a `VisualCoTCollator` batch.

        Raises:
            LossNotFinite: when a part of a training loss is no number.
        """
        inputs = dict(inputs)
        names, evidence = inputs.pop("names"), inputs.pop("evidence_mask")
        parts, record, outputs = self._parts(model, inputs, evidence)
        weights = self.args.loss_weights()
        loss = sum(weights[name] * part.mean() for name, part in parts.items())
        if model.training and not loss.isfinite():
            raise LossNotFinite(self.state.global_step + 1, parts, names)
        figures = figures_of(record, evidence, len(names))
        self._figures["train" if model.training else "eval"].add(parts | figures)
        return (loss, outputs) if return_outputs else loss

    def _parts(
        self, model: nn.Module, inputs: dict, evidence: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], GlimpseRecord, ModelOutput]:
        """The parts of the loss that have a weight, `(rows,)` each, and what they come from."""
        wanted = self.args.loss_weights().keys()
        answers_in_place = "answer_loss" in wanted
        pages = prefix = None
        if self.args.look_once:
            pages = Pages.of_batch(inputs, self._encode(inputs["visuals"]))
            prefix = self._look(pages, self.model, answers_in_place)
        if not wanted.isdisjoint(("answer_loss", "distillation_loss")):
            inputs = self._with_own_answers(inputs, prefix)
        labels = inputs["labels"][:, inputs["prompt_length"] :]
        given = self._without_pixels(inputs, prefix)
        record, outputs = self._glimpse(model, given, answers_in_place)
        parts = located_losses(record, evidence, len(labels))
        if answers_in_place:
            answer = answer_loss(outputs.logits[:, :-1], labels)
            parts["answer_loss"] = answer.expand(len(labels))
        whole = given
        if record.encoded is not None and not wanted.isdisjoint(TAUGHT):
            whole, pages = self._seen_whole(inputs, pages)
        if "late_loss" in wanted:
            parts["late_loss"] = self._late_loss(whole, record, len(labels), pages)
        if "distillation_loss" in wanted:
            parts |= self._distil(model.training, given, whole, labels, record)
        return {name: parts[name] for name in wanted}, record, outputs

    def _glimpse(
        self, model: nn.Module, inputs: dict, with_answers: bool
    ) -> tuple[GlimpseRecord, ModelOutput]:
        """Importance with gradients, and the answers' logits with every token kept if wanted."""
        if not with_answers:
            inputs = inputs | _prompts(inputs)
        completion = inputs["input_ids"].shape[1] - inputs["prompt_length"]
        outputs = model(
            **(given_cache(DynamicCache()) | inputs),
            in_place=not self.runs_beside,
            only_glimpse=not with_answers,
            use_cache=True,
            logits_to_keep=completion + 1,
        )
        return cache_of(outputs).glimpse, outputs

    def _late_loss(
        self, inputs: dict, record: GlimpseRecord, num_rows: int, pages: Pages | None
    ) -> torch.Tensor:
        """Dice and binary cross-entropy against the late glimpse's probabilities, `(rows,)`."""
        given, cache = inputs | _prompts(inputs), DynamicCache()
        with torch.no_grad(), self.accelerator.autocast():
            if pages is not None:
                model = self.accelerator.unwrap_model(self.model)
                cache = self._look(pages, with_backbone(model, self.late))
            outputs = self.late(**(given | given_cache(cache)), only_glimpse=True, use_cache=True)
        late = cache_of(outputs).glimpse
        losses = located_losses(record, late.importance.sigmoid(), num_rows)
        return losses["dice_loss"] + losses["bce_loss"]

    def _distil(
        self,
        training: bool,
        inputs: dict,
        whole: dict,
        labels: torch.Tensor,
        record: GlimpseRecord,
    ) -> dict[str, torch.Tensor]:
        """Both parts of distillation, `(rows,)` each.

        The base answers with all tokens and with a mask: soft in training, the model's own choice
        otherwise. Neither run has trainable weights, so DDP need not see them.

        Args:
            whole: `inputs` whose images were encoded without leaving anything out.
        """
        model = self.accelerator.unwrap_model(self.model)
        settings = {"use_cache": CACHE_NAME in inputs, "logits_to_keep": labels.shape[1] + 1}
        with torch.no_grad():
            teacher = model(**whole, prune=False, **settings).logits[:, :-1]
        mask = {"visual_keep_mask": record.keep_mask}
        if training:
            mask = {"visual_log_keep": self._soft_mask(record)}
        student = model(**inputs, **mask, **settings).logits[:, :-1]
        target = self.args.retention_target
        return {
            "distillation_loss": distillation_loss(teacher, student, labels),
            "retention_loss": retention_loss(record.importance, record.rows, len(labels), target),
        }

    def _soft_mask(self, record: GlimpseRecord) -> torch.Tensor:
        """`(N,)` log keep probabilities at this step's temperature."""
        args, state = self.args, self.state
        progress = state.global_step / max(1, state.max_steps)
        temperature = annealed(args.mask_temperature, args.final_mask_temperature, progress)
        noise = logistic_noise(record.importance) if args.mask_noise else None
        soft = log_keep_probability(record.importance, temperature, noise)
        config = self.accelerator.unwrap_model(self.model).config
        return soft.masked_fill(corner_tokens(record.geometry, config.anchor_corners), 0.0)

    def _with_own_answers(self, inputs: dict, prefix: GlimpsePrefix | None = None) -> dict:
        """The same with the base's greedy answer, all visual tokens kept, where a row has none."""
        missing = (inputs["labels"] == IGNORED_LABEL).all(1)
        if not missing.any():
            return inputs
        model, was_training = self.accelerator.unwrap_model(self.model), self.model.training
        prompts = _prompts(inputs)
        if prefix is None or prefix.held.tokens.encoded is not None:  # the base sees everything
            prompts |= repeat_visuals(inputs["visuals"], inputs["image_index"])
        else:
            prompts = prefix.prompts(prompts["input_ids"], prompts["attention_mask"])
            prompts |= given_cache(prefix)
        model.eval()
        sequences = model.generate(
            **prompts,
            prune=False,
            do_sample=False,
            max_new_tokens=self.args.max_answer_tokens,
        )
        model.train(was_training)
        own = sequences[:, prompts["input_ids"].shape[1] :]
        return with_completions(inputs, own, missing, self._end_tokens())

    def _end_tokens(self) -> list[int]:
        """Tokens that end an answer."""
        tokens = self.accelerator.unwrap_model(self.model).generation_config.eos_token_id
        return tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """The loss alone; no outputs are gathered."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """As `Trainer`'s, with the parts of the loss and the figures among the metrics."""
        self._figures["eval"].clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._figures["eval"].means(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{name}": means[name] for name in means})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer`'s; beside the loss, its parts and the figures."""
        if "loss" in logs:
            logs = {**logs, **self._figures["train"].means(self.accelerator)}
            self._figures["train"].clear()
        super().log(logs, start_time)

    def _encode(
        self, visuals: dict[str, torch.Tensor], redundant_patches: bool | None = None
    ) -> VisualFeatures:
        """Encode each image once.

        Args:
            redundant_patches: None leaves out what the configuration says, False nothing.
        """
        backbone = self.accelerator.unwrap_model(self.model).model
        with torch.no_grad(), self.accelerator.autocast():
            return backbone.encode_telling("image", redundant_patches, **visuals)

    def _look(self, pages: Pages, model: nn.Module, in_place: bool = False) -> GlimpsePrefix:
        with self.accelerator.autocast():
            return pages.look(self.accelerator.unwrap_model(model), in_place)

    def _without_pixels(
        self, inputs: dict, prefix: GlimpsePrefix | None, redundant_patches: bool | None = None
    ) -> dict:
        """What the model takes of a batch: its tokens over a look, or with its images encoded."""
        if prefix is not None:
            return behind_pages(inputs, prefix)
        others = ("labels", "visuals", "image_index")
        features = self._encode(inputs["visuals"], redundant_patches)
        encoded = {"image": features.select(inputs["image_index"].tolist())}
        inputs = {name: value for name, value in inputs.items() if name not in others}
        return inputs | {"mm_encoder_outputs": encoded}

    def _seen_whole(self, inputs: dict, pages: Pages | None) -> tuple[dict, Pages | None]:
        """A batch as the model takes it, and its pages, with nothing left out of its images."""
        if pages is None:
            return self._without_pixels(inputs, None, redundant_patches=False), None
        pages = replace(pages, features=self._encode(inputs["visuals"], redundant_patches=False))
        return behind_pages(inputs, self._look(pages, self.model)), pages

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model)
        save_glimpse(model, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        model = self.model if model is None else model
        load_glimpse(self.accelerator.unwrap_model(model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        logger.info("going back to the best checkpoint, %s", self.state.best_model_checkpoint)
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class LossNotFinite(ValueError):
    """A part of the loss became infinite or no number; the message says when and for what rows.

    Args:
        step: the optimiser's step that the batch belongs to, from 1.
        parts: `(rows,)` each part of the loss.
        names: what the rows are called.
    """

    def __init__(self, step: int, parts: dict[str, torch.Tensor], names: list[str]):
        faults = {
            name: [row for row, value in enumerate(part.tolist()) if not math.isfinite(value)]
            for name, part in parts.items()
        }
        sentences = [
            f"{name} of {'; '.join(names[row] for row in rows)}"
            for name, rows in faults.items()
            if rows
        ]
        super().__init__(f"at step {step} the loss is no finite number: {', '.join(sentences)}")


def with_completions(
    inputs: dict, completions: torch.Tensor, chosen: torch.Tensor, end_tokens: list[int]
) -> dict:
    """A batch with other completions in some of its rows.

    Args:
        inputs: of a `VisualCoTCollator`.
        completions: `(batch, tokens)`, each up to and with its first end token, if it has one.
        chosen: `(batch,)` bool, the rows that take theirs.
        end_tokens: the ends of answers.
    """
    start = inputs["prompt_length"]
    ends = torch.isin(completions, completions.new_tensor(end_tokens))
    real = ends.cumsum(1) - ends.long() == 0
    length = max(inputs["input_ids"].shape[1] - start, completions.shape[1])
    later = {
        "input_ids": completions.masked_fill(~real, 0),
        "attention_mask": real,
        "labels": completions.masked_fill(~real, IGNORED_LABEL),
        "mm_token_type_ids": torch.zeros_like(completions),
    }
    filled = dict(inputs)
    for name in later.keys() & inputs.keys():
        value = IGNORED_LABEL if name == "labels" else 0
        own, given = (
            pad(part, (0, length - part.shape[1]), value=value)
            for part in (later[name].to(inputs[name]), inputs[name][:, start:])
        )
        completion = torch.where(chosen[:, None], own, given)
        filled[name] = torch.cat([inputs[name][:, :start], completion], dim=1)
    return filled


def freeze_unread_additions(model: PreTrainedModel) -> None:
    """Leave low-rank additions alone that no look of this model reads: they stay at zero.

    Of the last layer that is read, K, count the glimpse's query, its key where scores are a softmax
    over all keys, and the keys of stale states; stale states begin above layer P.
    """
    config, glimpse = model.config, model.model.glimpse
    last = max(config.attention_layers)
    prune_layer = config.glimpse_layer if config.prune_layer is None else config.prune_layer
    query_maps = {"q_proj", "k_proj"} if glimpse.log_probabilities else {"q_proj"}
    for additions, first, of_last in (
        (glimpse.token_additions, 0, query_maps),
        (glimpse.stale_additions, prune_layer + 1, {"k_proj"}),
    ):
        for index, maps in (additions or {}).items():
            for name, addition in maps.items():
                unread = not first <= int(index) <= last
                unread |= int(index) == last and name not in of_last
                addition.requires_grad_(not unread)


def _prompts(inputs: dict) -> dict[str, torch.Tensor]:
    """The text inputs of a batch without its completions."""
    behind = inputs["input_ids"].shape[1] - inputs["prompt_length"]
    text = [name for name in TEXT_INPUTS if name in inputs]
    return {name: inputs[name][:, : inputs[name].shape[1] - behind] for name in text}
