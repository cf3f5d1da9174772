"""Settings of stage 1: what the trainer takes, and the recipe file around it."""

import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import transformers
import yaml
from transformers import TrainingArguments

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
WEIGHTS = (
    "grounding_weight",
    "dice_weight",
    "bce_weight",
    "answer_weight",
    "distillation_weight",
    "retention_weight",
)
TEMPERATURES = ("mask_temperature", "final_mask_temperature")
EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # YAML 1.1 takes 1e-4 for a string


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
        mask_temperature, final_mask_temperature: of the soft mask at the first and the last step;
            it falls geometrically in between.
        mask_noise: whether soft masks are drawn at random, see `log_keep_probability`.
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
    mask_temperature: float = 0.25
    final_mask_temperature: float = 0.1
    mask_noise: bool = True
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
        }
        return {name: weight for name, weight in weights.items() if weight > 0}

    def _check_objectives(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in WEIGHTS and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{each.name} must not be negative, got {value}")
            if each.name in TEMPERATURES and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{each.name} must be positive, got {value}")
        if not self.loss_weights():
            raise ValueError(
                "there is no objective: grounding_weight and distillation_weight, or the weights "
                "of all parts of grounding, are 0"
            )
        if self.retention_target is not None and not 0 < self.retention_target <= 1:
            raise ValueError(f"retention_target must lie in (0, 1], got {self.retention_target}")
        if self.max_answer_tokens < 1:
            raise ValueError(f"max_answer_tokens must be 1 or more, got {self.max_answer_tokens}")


@dataclass
class Stage1Recipe:
    """A recipe file: data, base and settings of one run of stage 1.

    Args:
        base: a stock model or a GlimpsePrune repository to go on training; folder or Hub id.
        data: JSON-lines file in the Visual-CoT schema.
        validation_data: the same, held out; None measures nothing.
        image_folder: folder that image paths are relative to; default: each file's own.
        output: folder of the repository to be written.
        glimpse: configuration fields of the glimpse (see `GlimpsePruneConfigMixin`) for a stock
            base.
        start_text: text whose mean token embedding fresh glimpse tokens start as; default: random.
        questions_per_image: questions about one image that may share a batch, and its encoding;
            `training.per_device_train_batch_size` counts images then.
        max_questions: use the first so many questions of `data`.
        skip_rows_without_boxes: leave such rows out instead of refusing them.
        min_pixels, max_pixels: bounds on a training image's area; default: the processor's.
        attn_implementation: as `from_pretrained` takes it.
        training: fields of `Stage1Config`.
    """

    base: str | None = None
    data: str | None = None
    validation_data: str | None = None
    image_folder: str | None = None
    output: str | None = None
    glimpse: dict = field(default_factory=dict)
    start_text: str | None = None
    questions_per_image: int = 1
    max_questions: int | None = None
    skip_rows_without_boxes: bool = False
    min_pixels: int | None = None
    max_pixels: int | None = None
    attn_implementation: str | None = None
    training: dict = field(default_factory=dict)

    def __post_init__(self):
        for name in ("base", "data", "output"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: name it in the recipe or by --{name}")

    @property
    def checkpoint_folder(self) -> Path:
        """Where a run keeps what it needs to be resumed: beside the output."""
        output = Path(self.output).absolute()
        return output.with_name(f"{output.name}.checkpoints")

    def training_config(self) -> Stage1Config:
        """The trainer's settings.

        Raises:
            ValueError: for a field that does not exist or cannot be.
        """
        known = {each.name for each in fields(Stage1Config) if each.init}
        unknown = set(self.training) - (known - {"output_dir"})
        if unknown:
            raise ValueError(f"recipe: unknown field training.{sorted(unknown)[0]}")
        settings = {"output_dir": str(self.checkpoint_folder), **self.training}
        if self.validation_data:
            settings.setdefault("eval_strategy", "steps")
            settings.setdefault("eval_steps", settings.get("save_steps", Stage1Config.save_steps))
        return Stage1Config(**settings)


def load_recipe(path: str | Path | None, overrides: dict[str, object]) -> Stage1Recipe:
    """Read a recipe and put other values in the place of some of its own.

    Args:
        path: a YAML file, or None for the defaults alone.
        overrides: values by field; a dot reaches into `glimpse` and `training`.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming the field that is unknown, missing or of a wrong type.
    """
    content = {}
    if path is not None:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a recipe is a mapping of fields, got {content!r}")
    for name, value in overrides.items():
        section, dot, key = name.partition(".")
        if dot:
            content[section] = {**content.get(section, {}), key: value}
        else:
            content[section] = value
    known = {each.name for each in fields(Stage1Recipe)}
    for name, value in content.items():
        if name not in known:
            raise ValueError(f"recipe: unknown field {name}")
        if name in ("glimpse", "training") and not isinstance(value, dict):
            raise ValueError(f"recipe: {name} must be a mapping of fields, got {value!r}")
    return Stage1Recipe(**_with_numbers(content))


def parse_override(text: str) -> tuple[str, object]:
    """`"training.learning_rate=1e-3"` to its field and value, which is read as YAML.

    Raises:
        ValueError: when there is no `=`.
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--set takes field=value, got {text!r}")
    return name, yaml.safe_load(value)


def computes_in_bfloat16() -> bool:
    """Whether this machine multiplies matrices in bfloat16 faster than in float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _with_numbers(value: object) -> object:
    """The same with numbers such as `1e-4`, which YAML leaves as strings, as numbers."""
    if isinstance(value, dict):
        return {name: _with_numbers(each) for name, each in value.items()}
    if isinstance(value, str) and EXPONENT.fullmatch(value):
        return float(value)
    return value
