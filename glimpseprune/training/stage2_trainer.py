"""Stage 2: reinforcement learning on pruned sequences (paper, section 3.4).

trl's GRPO with other rollouts and other log-probabilities: completions are sampled by the model's
own `generate`, which prunes the prompt, and scored by the exact forward over the same kept tokens.
With sampled masks the choice of tokens is part of what is learned.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import RepeatSampler, selective_log_softmax_and_entropy

from ..data.visual_cot import VisualCoTRow
from ..data.visual_cot_collator import VisualCoTCollator
from .checkpoints import load_glimpse, save_glimpse
from .rollout import SharedPrompts, completion_logits, sample_completions, share_prompts
from .sampled_masks import check_threshold, draw_masks, glimpse_at, mask_log_probs, share_masks
from .stage2_config import Lora, Stage2Config


class NonFiniteLoss(ValueError):
    """Training cannot go on; the message says where it stopped."""


class EpochSampler(Sampler):
    """trl's sampler with an order that depends on seed and epoch alone.

    trl's own draws each epoch's order from where the last one left its generator, so a run resumed
    in a later epoch would start over with the first order.

    Args:
        sampler: trl's.
        epoch: tells the number of the epoch that begins.
    """

    def __init__(self, sampler: RepeatSampler, epoch: Callable[[], int]):
        self.sampler, self.epoch = sampler, epoch

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed + self.epoch())
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class Stage2Trainer(GRPOTrainer):
    """A `GRPOTrainer` for the language model of a GlimpsePrune model.

    Only LoRA factors of the language model are trained, and with sampled masks the glimpse; the
    vision encoder is frozen. Completions of one prompt share its image's encoding, and unless masks
    are sampled its mask and its prefill, when sampled and when scored, as far as they are in one
    batch.

    Args:
        model: a GlimpsePrune model.
        args: settings.
        rewards: functions as trl takes them; beside its own arguments they get `answer` and
            `retention`.
        questions: what to ask. With `args.shuffle_dataset` off, questions about one image that
            follow each other share its encoding.
        collator: makes prompts of them.
        mask: one of `MASKS`, see `Stage2Recipe`.
        lora: the adapter.
        masks_per_prompt: sampled masks that the completions of a prompt share; None: one each.
        kwargs: as `GRPOTrainer` takes them.

    Raises:
        ValueError: for settings under which masks cannot be sampled.
        NonFiniteLoss: from `train`, when the loss is no number any more.
    """

    args: Stage2Config

    def __init__(
        self,
        model: PreTrainedModel,
        args: Stage2Config,
        rewards: Sequence[Callable],
        questions: Sequence[VisualCoTRow],
        collator: VisualCoTCollator,
        mask: str = "model",
        lora: Lora | None = None,
        masks_per_prompt: int | None = None,
        **kwargs,
    ):
        self.questions, self.collator, self.mask = questions, collator, mask
        self.masks_per_prompt = masks_per_prompt
        collator.tokenizer.padding_side = "left"
        self._prompts_of_rows: list[tuple[SharedPrompts, int]] = []
        columns = [
            {"prompt": row.question, "answer": row.answer, "question": number}
            for number, row in enumerate(questions)
        ]
        super().__init__(
            model,
            list(rewards),
            args,
            train_dataset=Dataset.from_list(columns),
            processing_class=collator.processor,
            peft_config=(lora or Lora()).config(model),
            **kwargs,
        )
        if mask == "sampled":
            check_threshold(model.config)
            accumulated = args.gradient_accumulation_steps
            if args.num_iterations > 1 or args.steps_per_generation > accumulated:
                raise ValueError(
                    "sampled masks need one update a round: num_iterations 1, and "
                    "steps_per_generation no more than gradient_accumulation_steps"
                )
            self._glimpse_model.model.glimpse.requires_grad_(True)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochSampler:
        sampler = super()._get_train_sampler(dataset)
        return EpochSampler(sampler, lambda: int(self.state.epoch or 0))

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        """As trl, with each row's prompt beside its tensors."""
        numbers = [each["question"] for each in inputs]
        different = list(dict.fromkeys(numbers))
        batch = self.collator([[self.questions[number] for number in different]])
        prompts = share_prompts(self._glimpse_model, batch)
        if self.mask == "evidence":
            prompts = prompts.with_masks(batch["evidence_mask"].to(self.accelerator.device))
        elif self.mask == "all":
            keep = torch.ones(sum(prompts.visual_counts), dtype=torch.bool)
            prompts = prompts.with_masks(keep.to(self.accelerator.device))
        rows = [different.index(number) for number in numbers]
        if self.mask == "sampled":
            prompts, rows = self._with_drawn_masks(prompts, rows)
        self._prompts_of_rows = [(prompts, row) for row in rows]
        output = super()._generate_and_score_completions(inputs)
        return output | {"prompts_of_rows": self._prompts_of_rows}

    @torch.no_grad()
    def _with_drawn_masks(
        self, prompts: SharedPrompts, rows: list[int]
    ) -> tuple[SharedPrompts, list[int]]:
        """Each prompt as often as it gets a mask, and which of these each row has."""
        model = self._glimpse_model
        training = model.training
        prompts = prompts.looked_at(model.eval())
        record = glimpse_at(model, prompts, list(range(len(prompts.image_index))))
        model.train(training)
        copies, rows = share_masks(rows, self.masks_per_prompt)
        masks = draw_masks(record, model.config, prompts.visual_counts, copies)
        return prompts.repeated(copies).with_masks(masks), rows

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict]:
        shared, rows = self._shared()
        ids, mask = shared.inputs["input_ids"][rows], shared.inputs["attention_mask"][rows].bool()
        return [row[real].tolist() for row, real in zip(ids, mask, strict=True)], None, {}

    def _generate_single_turn(self, *args, **kwargs) -> tuple[list[list[int]], None]:
        """Sampled completions, each with the token that ends it; afterwards the masks are known."""
        shared, rows = self._shared()
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            training = model.training
            model.eval()  # dropout would choose other masks and tokens than the model does
            try:
                completions, shared = sample_completions(
                    model, shared, rows, self.generation_config
                )
            finally:
                model.train(training)
        self._prompts_of_rows = [(shared, row) for row in rows]
        ends = torch.isin(completions, torch.tensor(self.eos_token_ids, device=completions.device))
        before = ends.cumsum(1) - ends.long() == 0
        return [row[real].tolist() for row, real in zip(completions, before, strict=True)], None

    def _calculate_rewards(self, inputs: list[dict], *args) -> torch.Tensor:
        shared, rows = self._shared()
        shares = shared.retention
        shares = [shares[row] for row in rows]
        mode = "train" if self.model.training else "eval"
        mean = self.accelerator.gather(torch.tensor(shares, device=self.accelerator.device)).mean()
        self._metrics[mode]["retention"].append(mean.item())
        known = [each | {"retention": share} for each, share in zip(inputs, shares, strict=True)]
        return super()._calculate_rewards(known, *args)

    def _compute_loss(self, model: nn.Module, inputs: dict) -> torch.Tensor:
        self._prompts_of_rows = inputs["prompts_of_rows"]
        if self.mask != "sampled":
            loss = super()._compute_loss(model, inputs)
        else:
            shared, rows = self._looked_at()
            self._prompts_of_rows = [(shared, row) for row in rows]
            loss = super()._compute_loss(model, inputs)
            loss = loss + self._mask_loss(model, inputs["advantages"])
            self._prompts_of_rows = inputs["prompts_of_rows"]
        if not torch.isfinite(loss):
            raise NonFiniteLoss(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}"
                f"{_what_else(inputs)}: lower the learning rate, or look at the data"
            )
        return loss

    def _mask_loss(self, model: nn.Module, advantages: torch.Tensor) -> torch.Tensor:
        """The policy gradient of the masks, on-policy: completions' advantages are theirs too."""
        shared, rows = self._shared()
        sources = [shared.sources[row] for row in rows]
        different = list(dict.fromkeys(sources))
        first = [rows[sources.index(source)] for source in different]
        self._glimpse_model.model.glimpse.eval()  # without dropout, as when masks were drawn
        with self.accelerator.autocast():
            record = glimpse_at(model, shared, first)
        log_probs = mask_log_probs(
            record,
            self._glimpse_model.config,
            [shared.visual_counts[row] for row in first],
            [different.index(source) for source in sources],
            [shared.keep_masks[row] for row in rows],
        )
        mode = "train" if self.model.training else "eval"
        mean = self.accelerator.gather(log_probs.detach().mean()).mean()
        self._metrics[mode]["mask_log_prob"].append(mean.item())
        steps = self.current_gradient_accumulation_steps if mode == "train" else 1
        return -(advantages * log_probs).mean() / steps

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Log-probabilities `(rows, logits_to_keep)` of the completions, by the exact forward.

        trl's own, which runs the whole sequence at once through the backbone, would let completions
        see dropped tokens in the layers up to K if it were not told where prompts end.
        """
        shared, rows = self._looked_at() if self.mask == "sampled" else self._shared()
        completion_ids = input_ids[:, -logits_to_keep:]
        completion_mask = attention_mask[:, -logits_to_keep:]
        log_probs, entropies = [], []
        for start in range(0, len(rows), batch_size or len(rows)):
            part = slice(start, start + (batch_size or len(rows)))
            with self.accelerator.autocast():
                logits = completion_logits(
                    model, shared, rows[part], completion_ids[part], completion_mask[part]
                )
            values, entropy = selective_log_softmax_and_entropy(
                logits.float(),
                completion_ids[part],
                entropy_requires_grad=self._entropy_bonus_enabled,
                temperature=self.temperature,
            )
            log_probs.append(values)
            entropies.append(entropy)
        return torch.cat(log_probs), torch.cat(entropies) if compute_entropy else None, None

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """As trl's, the glimpse with a learning rate of its own if the settings give one."""
        optimizer, rate = super().create_optimizer(*args, **kwargs), self.args.glimpse_learning_rate
        if rate is not None:
            own = {id(weight) for weight in self._glimpse_model.model.glimpse.parameters()}
            for group in list(optimizer.param_groups):
                moved = [weight for weight in group["params"] if id(weight) in own]
                group["params"] = [weight for weight in group["params"] if id(weight) not in own]
                if moved:
                    optimizer.add_param_group({**group, "params": moved, "lr": rate})
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.mask == "sampled" and self.args.should_save:
            save_glimpse(self._glimpse_model, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.mask == "sampled":
            load_glimpse(self._glimpse_model, Path(resume_from_checkpoint))

    @property
    def _glimpse_model(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model).get_base_model()

    def _looked_at(self) -> tuple[SharedPrompts, list[int]]:
        """As `_shared`, over one look at each prompt of the rows, for all its masks."""
        shared, rows = self._shared()
        if shared.prefix is None:
            chosen = sorted(set(rows))
            with self.accelerator.autocast():
                shared = shared.part(chosen).looked_at(self._glimpse_model)
            rows = [chosen.index(row) for row in rows]
        return shared, rows

    def _shared(self) -> tuple[SharedPrompts, list[int]]:
        """The prompts of the rows at hand, which are all of one round, and the prompt of each."""
        return self._prompts_of_rows[0][0], [row for _, row in self._prompts_of_rows]


def _what_else(inputs: dict) -> str:
    """Which of a batch's tensors hold something that is no number."""
    names = ("advantages", "old_per_token_logps", "ref_per_token_logps")
    faulty = [name for name in names if name in inputs and not inputs[name].isfinite().all()]
    return f" (already not finite: {', '.join(faulty)})" if faulty else ""
