"""Settings of stage 2: what the trainer takes, and the recipe file around it."""

from dataclasses import asdict, dataclass, field, fields

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from trl import GRPOConfig

from .recipe import TrainingRecipe, check_known, refuse_sharded_weights
from .stage1_config import computes_in_bfloat16

MASKS = ("model", "sampled", "evidence", "all")


@dataclass
class Stage2Config(GRPOConfig):
    """trl's `GRPOConfig`; defaults follow the official recipe.

    Args:
        bf16: mixed precision; `"auto"` switches it on where the hardware computes in bfloat16.
        glimpse_learning_rate: of the glimpse, which sampled masks train; None: `learning_rate`.
    """

    bf16: bool | str = "auto"
    glimpse_learning_rate: float | None = None
    beta: float = 0.04
    num_generations: int = 4
    max_completion_length: int = 128
    loss_type: str = "grpo"
    learning_rate: float = 1e-4
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 4
    gradient_checkpointing: bool = False
    logging_steps: float = 10
    save_steps: float = 50
    save_total_limit: int | None = 2
    report_to: str | list[str] | None = "none"
    remove_unused_columns: bool | None = False
    # Every adapter weight takes part in every loss.
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self):
        if self.bf16 == "auto":
            self.bf16 = computes_in_bfloat16()
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False
            self.use_cpu = self.use_cpu or self.bf16  # bfloat16 elsewhere is refused unless asked
        if self.use_vllm:
            raise ValueError(
                "use_vllm: rollouts run through the model's own generate, which prunes"
            )
        super().__post_init__()
        refuse_sharded_weights(self)


@dataclass
class Lora:
    """The adapter; defaults follow the official recipe.

    Args:
        rank: of the two factors.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: of the adapter's input.
        target_modules: names of linear layers of the language model; None for all of them.
    """

    rank: int = 32
    alpha: float = 64
    dropout: float = 0.05
    target_modules: list[str] | None = None

    def config(self, model: PreTrainedModel) -> LoraConfig:
        """peft's configuration, whose names fit the language model alone.

        Raises:
            ValueError: for a name that no linear layer of the language model bears, or settings
                that cannot be.
        """
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise ValueError("lora: rank must be positive and dropout lie in [0, 1)")
        known = {
            name.rpartition(".")[2]
            for name, module in model.model.language_model.named_modules()
            if isinstance(module, nn.Linear)
        }
        wanted = sorted(known if self.target_modules is None else set(self.target_modules))
        for name in wanted:
            if name not in known:
                raise ValueError(
                    f"lora: {name} is no linear layer of the language model, which has "
                    f"{', '.join(sorted(known))}"
                )
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=rf"model\.language_model\.(?:.*\.)?(?:{'|'.join(wanted)})",
            task_type="CAUSAL_LM",
        )


@dataclass
class Stage2Recipe(TrainingRecipe):
    """A recipe file: data, base and settings of one run of stage 2; beside those of every run:

    Args:
        base: a GlimpsePrune repository, or with masks that need no glimpse a stock model; folder or
            Hub id.
        mask: what rollouts keep: what the `"model"` chooses; a choice `"sampled"` for each
            completion, from which the glimpse learns too (see `sampled_masks.py`); the
            `"evidence"` boxes; or `"all"` tokens, which is reinforcement learning without pruning.
        masks_per_prompt: with sampled masks, how many the completions of a prompt share; fewer cost
            less; None: each has its own.
        rewards: weight of each reward (see `rewards.py`) by its name.
        judge: fields of `JudgeConfig`, for the reward `judge`.
        lora: fields of `Lora`.
        stage1_recipe: the recipe to run on the merged model, by name or path, for `glimpseprune
            merge` to name.
        training: fields of `Stage2Config`.
    """

    mask: str = "model"
    masks_per_prompt: int | None = None
    rewards: dict = field(default_factory=lambda: {"exact_match": 1.0})
    judge: dict = field(default_factory=dict)
    lora: dict = field(default_factory=dict)
    stage1_recipe: str | None = None
    training: dict = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        if self.mask not in MASKS:
            raise ValueError(f"mask must be one of {', '.join(MASKS)}, got {self.mask!r}")
        if self.masks_per_prompt is not None and (
            self.mask != "sampled" or self.masks_per_prompt < 1
        ):
            raise ValueError("masks_per_prompt takes a positive number, with mask: sampled")
        check_known("lora", self.lora, (each.name for each in fields(Lora)))
        known = {each.name for each in fields(Stage2Config) if each.init}
        check_known("training", self.training, known - {"output_dir", "reward_weights"})
        if self.mask != "sampled" and self.training.get("glimpse_learning_rate") is not None:
            raise ValueError("glimpse_learning_rate takes mask: sampled, which trains the glimpse")

    def training_config(self) -> Stage2Config:
        """The trainer's settings.

        Raises:
            ValueError: for one that cannot be.
        """
        weights = [float(weight) for weight in self.rewards.values()]
        return Stage2Config(
            output_dir=str(self.checkpoint_folder), reward_weights=weights, **self.training
        )

    def to_dict(self) -> dict:
        """All fields, for a summary."""
        return asdict(self)
