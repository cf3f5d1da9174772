"""Stage 1: trains the glimpse token and the visual importance predictor on a frozen base.

One forward of the model serves all losses (paper, section 3.3; weights of the official
configuration): importance against evidence boxes by Dice and binary cross-entropy, and the answer's
cross-entropy with the glimpse token in place, where all visual tokens stay.
"""

import logging
import os
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DynamicCache, PreTrainedModel, Trainer
from transformers.modeling_outputs import ModelOutput

from modeling_glimpseprune.visual_tokens import VisualFeatures

from .stage1_config import Stage1Config
from .stage1_losses import answer_loss, bce_loss, dice_loss, mask_figures

GLIMPSE_WEIGHTS = "glimpse.safetensors"

logger = logging.getLogger(__name__)


class Stage1Trainer(Trainer):
    """A `Trainer` for `model.model.glimpse`; everything else in the model is frozen.

    Checkpoints hold the glimpse weights alone, with the optimiser's, the scheduler's and the random
    generators' states. Beside the loss, its parts and the figures of `mask_figures` are logged, as
    averages over the questions since the last logging, and over all questions of an evaluation.

    Args:
        model: a GlimpsePrune model; its glimpse weights count as trained from now on.
        args: settings.
        kwargs: as `Trainer` takes them. The data collator must be a `VisualCoTCollator`.
    """

    args: Stage1Config

    def __init__(self, model: PreTrainedModel, args: Stage1Config, **kwargs):
        model.requires_grad_(False)
        model.model.glimpse.requires_grad_(True)
        model.model.glimpse.trained.fill_(True)
        super().__init__(model=model, args=args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the questions of a batch
        self._figures = {"train": FigureMeans(), "eval": FigureMeans()}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ModelOutput]:
        """The weighted sum of the losses of a `VisualCoTCollator` batch."""
        inputs = dict(inputs)
        labels, evidence = inputs.pop("labels"), inputs.pop("evidence_mask")
        prompt_length = inputs["prompt_length"]
        cache = DynamicCache()
        outputs = model(
            mm_encoder_outputs={"image": self._encode_images(inputs)},
            in_place=True,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=labels.shape[1] - prompt_length + 1,
            **inputs,
        )
        record, num_rows = cache.glimpse, len(labels)
        dice = dice_loss(record.importance, evidence, record.rows, num_rows)
        bce = bce_loss(record.importance, evidence, record.rows, num_rows)
        answer = answer_loss(outputs.logits[:, :-1], labels[:, prompt_length:])
        weights = self.args.dice_weight, self.args.bce_weight, self.args.answer_weight
        loss = weights[0] * dice.mean() + weights[1] * bce.mean() + weights[2] * answer
        figures = mask_figures(record.keep_mask, evidence, record.rows, num_rows)
        parts = {"dice_loss": dice, "bce_loss": bce, "answer_loss": answer.expand(num_rows)}
        self._figures["train" if model.training else "eval"].add(parts | figures)
        return (loss, outputs) if return_outputs else loss

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

    def _encode_images(self, inputs: dict) -> VisualFeatures:
        """Encode each image once and hand its features to every row that shows it."""
        backbone = self.accelerator.unwrap_model(self.model).model
        visuals, index = inputs.pop("visuals"), inputs.pop("image_index").tolist()
        with torch.no_grad(), self.accelerator.autocast():
            features = backbone.encode_visual("image", **visuals)
        return replace(
            features,
            pooler_output=[features.pooler_output[image] for image in index],
            deepstack_features=[
                [layer[image] for image in index] for layer in features.deepstack_features
            ],
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.accelerator.unwrap_model(self.model).model.glimpse.state_dict()
        partial = folder / f"{GLIMPSE_WEIGHTS}.partial"
        save_file({name: weight.contiguous() for name, weight in weights.items()}, partial)
        os.replace(partial, folder / GLIMPSE_WEIGHTS)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        model = self.model if model is None else model
        weights = load_file(Path(resume_from_checkpoint) / GLIMPSE_WEIGHTS)
        self.accelerator.unwrap_model(model).model.glimpse.load_state_dict(weights)

    def _load_best_model(self) -> None:
        logger.info("going back to the best checkpoint, %s", self.state.best_model_checkpoint)
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class FigureMeans:
    """Running sums of figures; they wait for the device only when the means are read."""

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(()))
        self._count = 0

    def add(self, figures: dict[str, torch.Tensor]) -> None:
        """Add figures of a batch, each `(rows,)`."""
        for name, values in figures.items():
            self._sums[name] = self._sums[name].to(values.device) + values.detach().float().sum()
        self._count += len(next(iter(figures.values())))

    def clear(self) -> None:
        self._sums.clear()
        self._count = 0

    def means(self, accelerator) -> dict[str, float]:
        """The mean of each figure over all rows of all processes; none when there was no row."""
        if not self._count:
            return {}
        names = list(self._sums)
        count = torch.tensor(float(self._count), device=accelerator.device)
        sums = torch.stack([*(self._sums[name] for name in names), count])
        *sums, count = accelerator.reduce(sums, "sum").tolist()
        return {name: value / count for name, value in zip(names, sums, strict=True)}
