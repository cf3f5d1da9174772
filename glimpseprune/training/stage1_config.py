"""Settings of stage 1: what the trainer takes, and the recipe file around it."""

import math
from dataclasses import dataclass, field, fields

import torch
from transformers import PretrainedConfig, TrainingArguments

from modeling_glimpseprune.stock import TRANSFORMERS_5

from .recipe import TrainingRecipe, check_known, refuse_sharded_weights

WEIGHTS = (
    "grounding_weight",
    "dice_weight",
    "bce_weight",
    "answer_weight",
    "distillation_weight",
    "retention_weight",
    "late_weight",
)
TEMPERATURES = ("mask_temperature", "final_mask_temperature")


@dataclass
class Stage1Config(TrainingArguments):
    """`TrainingArguments` with the objectives' weights; defaults follow the official recipe.

    Args:
        grounding_weight: of the first objective, whose parts are the following three.
        dice_weight: of the Dice loss between importance and evidence.
        bce_weight: of the binary cross-entropy between the same.
        answer_weight: of the answer's cross-entropy with the glimpse token in place.
        distillation_weight: of the second objective, which needs no boxes and no answers: the KL
            divergence from the base's answer distribution to that under a soft mask.
        retention_weight: within distillation, of what keeping visual tokens costs.
        retention_target: the expected share of tokens kept that it pulls towards; None: the share
            itself is the cost, a price for every token.
        late_weight: of Dice and binary cross-entropy between importance and the probabilities that
            the recipe's `late_glimpse` gives.
        mask_temperature, final_mask_temperature: of the soft mask at the first and the last step;
            it falls geometrically in between.
        mask_noise: whether soft masks are drawn at random, see `log_keep_probability`.
        look_once: run layers 0..P over each different image of a batch once, for all its questions
            and all objectives; losses and gradients differ by rounding.
        max_answer_tokens: length of the base's own answers, for questions that come without one.
        warmup: share of the steps over which the learning rate rises; `warmup_steps` wins over it.
        bf16: mixed precision; `"auto"` switches it on where the hardware computes in bfloat16.

    Raises:
        ValueError: for a value out of its range, or when no objective has a weight.
    """

    grounding_weight: float = 1.0
    dice_weight: float = 1.0
    bce_weight: float = 0.1
    answer_weight: float = 1.0
    distillation_weight: float = 0.0
    retention_weight: float = 1.0
    retention_target: float | None = 0.1
    late_weight: float = 0.0
    mask_temperature: float = 0.25
    final_mask_temperature: float = 0.1
    mask_noise: bool = True
    look_once: bool = False
    max_answer_tokens: int = 32
    warmup: float = 0.1
    bf16: bool | str = "auto"
    learning_rate: float = 1e-4
    lr_scheduler_type: str = "cosine"
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 8
    logging_steps: float = 10
    save_steps: float = 200
    save_total_limit: int | None = 2
    report_to: str | list[str] | None = "none"
    remove_unused_columns: bool | None = False
    # The importance reaches the loss beside the model's outputs, so DDP must not search these for
    # unused weights; there are none.
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self):
        self._check_objectives()
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must lie in [0, 1], got {self.warmup}")
        if self.bf16 == "auto":
            self.bf16 = computes_in_bfloat16()
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False
            self.use_cpu = self.use_cpu or self.bf16  # bfloat16 elsewhere is refused unless asked
        if TRANSFORMERS_5:
            self.warmup_steps = self.warmup_steps or self.warmup
        else:
            self.warmup_ratio = self.warmup
        super().__post_init__()
        refuse_sharded_weights(self)

    @property
    def needs_boxes(self) -> bool:
        """Whether questions without evidence boxes are of no use."""
        return self.grounding_weight > 0

    @property
    def needs_answers(self) -> bool:
        """Whether questions without an answer are of no use."""
        return self.grounding_weight * self.answer_weight > 0

    def loss_weights(self) -> dict[str, float]:
        """The weight of each part of the loss by its name; parts of weight 0 are not computed."""
        grounding, distillation = self.grounding_weight, self.distillation_weight
        weights = {
            "dice_loss": grounding * self.dice_weight,
            "bce_loss": grounding * self.bce_weight,
            "answer_loss": grounding * self.answer_weight,
            "distillation_loss": distillation,
            "retention_loss": distillation * self.retention_weight,
            "late_loss": self.late_weight,
        }
        return {name: weight for name, weight in weights.items() if weight > 0}

    def check_glimpse(self, config: PretrainedConfig) -> None:
        """Refuse to train a glimpse in a way that it cannot be trained.

        Args:
            config: of its model.

        Raises:
            ValueError: when the answer shall see a glimpse token that is not in the sequence, or
                one in the sequence shall look at images of which patches were left out.
        """
        beside = runs_beside(config)
        if beside and "answer_loss" in self.loss_weights():
            raise ValueError(
                "answer_weight must be 0 where prune_layer is below glimpse_layer or "
                "glimpse_lora_rank above 0: the glimpse token is not in the sequence then, so no "
                "answer can see it"
            )
        tolerance = config.redundant_patches
        leaves_out = tolerance is not None and tolerance is not False  # 0 does, too
        if self.look_once and leaves_out and not beside:
            raise ValueError(
                "look_once with redundant_patches needs a glimpse beside the sequence: in it, over "
                "a look, the glimpse token needs whole images; leave one of the two out, or set "
                "prune_layer below glimpse_layer or glimpse_lora_rank above 0"
            )

    def _check_objectives(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in WEIGHTS and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{each.name} must not be negative, got {value}")
            if each.name in TEMPERATURES and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{each.name} must be positive, got {value}")
        if not self.loss_weights():
            raise ValueError(
                "there is no objective: grounding_weight, distillation_weight and late_weight, or "
                "the weights of all parts of grounding, are 0"
            )
        if self.retention_target is not None and not 0 < self.retention_target <= 1:
            raise ValueError(f"retention_target must lie in (0, 1], got {self.retention_target}")
        if self.max_answer_tokens < 1:
            raise ValueError(f"max_answer_tokens must be 1 or more, got {self.max_answer_tokens}")


@dataclass
class Stage1Recipe(TrainingRecipe):
    """A recipe file: data, base and settings of one run of stage 1; beside those of every run:

    Args:
        base: a stock model or a GlimpsePrune repository to go on training; folder or Hub id.
        validation_data: questions held out; None measures nothing.
        glimpse: configuration fields of the glimpse (see `GlimpsePruneConfigMixin`) for a stock
            base.
        late_glimpse: a GlimpsePrune repository on the same base whose glimpse is read late (P = K).
            Fresh glimpse weights start as its own, low-rank additions apart, which start at zero;
            with `training.late_weight` it is also the teacher.
        start_text: text whose mean token embedding fresh glimpse tokens start as; default: random.
            A trained glimpse goes on from where it is.
        questions_per_image: questions about one image that may share a batch, and its encoding,
            with `training.look_once` also layers 0..P over it;
            `training.per_device_train_batch_size` counts images then.
        training: fields of `Stage1Config`.
    """

    validation_data: str | None = None
    glimpse: dict = field(default_factory=dict)
    late_glimpse: str | None = None
    start_text: str | None = None
    questions_per_image: int = 1
    training: dict = field(default_factory=dict)

    def training_config(self) -> Stage1Config:
        """The trainer's settings.

        Raises:
            ValueError: for a field that does not exist or cannot be.
        """
        if self.training.get("late_weight") and not self.late_glimpse:
            raise ValueError("late_weight needs late_glimpse: the repository to learn from")
        known = {each.name for each in fields(Stage1Config) if each.init}
        check_known("training", self.training, known - {"output_dir"})
        settings = {"output_dir": str(self.checkpoint_folder), **self.training}
        if self.validation_data:
            settings.setdefault("eval_strategy", "steps")
            settings.setdefault("eval_steps", settings.get("save_steps", Stage1Config.save_steps))
        return Stage1Config(**settings)


def runs_beside(config: PretrainedConfig) -> bool:
    """Whether a glimpse token runs beside the sequence in training, and not in it."""
    early = config.prune_layer not in (None, config.glimpse_layer)
    return early or config.glimpse_lora_rank > 0


def computes_in_bfloat16() -> bool:
    """Whether this machine multiplies matrices in bfloat16 faster than in float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
