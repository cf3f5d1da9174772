"""What a training of the tiny base consists of: stages run in order, read from a YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..package_files import find_recipe

SOURCES = ("images", "cards", "both")


@dataclass(frozen=True)
class Stage:
    """One stretch of training.

    `source` says what is trained: "images" teaches the vision encoder to see (no questions),
    "cards" teaches the language model to answer about pages given as card codes, "both" trains
    the whole model on images and questions.

    A step takes as many pages of one grid as come near `tokens` visual tokens, and up to
    `questions` about each, in the shares of `kinds`; `form` is how they are put (see `packing`).
    `questions_a_step` above 0 is shared out among a step's pages instead, so that a large page,
    which fills a step alone, is asked about as much as many small ones.
    `rate` is the factor of the learning rates at the start and at the end, linear between.
    The weights are those of the losses for reading, for cards, and for being like the codes.
    `fit_batches` above 0 starts the stage by fitting the vision encoder's last layer to the codes
    on that many batches; `code_noise` is added to codes that stand in for images; `blind` hides
    the image from the tokens of every other question (see `packing`). `page_from_layer` holds the
    page back from all text in the decoder layers below it, so that looking is learned above; a
    training ends with 0, for a finished model sees everything. `freeze_vision` leaves the vision
    encoder be. `link_weight` is that of the loss on which label lies on the left of another (see
    `links`), read off the visual tokens after the decoder layer `link_layer`. `by_question` lets
    each question count alike in the answers' loss, not each token. `misspelled` is the share of the
    letters said so far in answers that are replaced by random ones (see `packing.misspell`).
    `ahead_weight` is that of the loss on the second letter of a key where the first is to be said
    (see `links.AheadHead`), read off the states after the decoder layer `ahead_layer`.
    """

    name: str
    source: str
    steps: int
    tokens: int
    grids: tuple[tuple[int, int], ...]
    rate: tuple[float, float] = (1.0, 1.0)
    warm_up: int = 20
    questions: int = 8
    questions_a_step: int = 0
    form: str = "chat"
    kinds: dict[str, float] = field(default_factory=lambda: {"value": 1.0})
    most_labels: int | None = None
    read_weight: float = 1.0
    card_weight: float = 1.0
    code_weight: float = 0.0
    code_noise: float = 0.0
    fit_batches: int = 0
    blind: bool = False
    page_from_layer: int = 0
    freeze_vision: bool = False
    link_weight: float = 0.0
    link_layer: int = 0
    by_question: bool = False
    misspelled: float = 0.0
    ahead_weight: float = 0.0
    ahead_layer: int = 0

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"source: {self.source!r} is not one of {SOURCES}")
        for name, value in vars(self).items():
            least = 1 if name in ("steps", "tokens", "questions", "most_labels") else 0
            if isinstance(value, int | float) and value < least:
                raise ValueError(f"{name} must be at least {least} in stage {self.name!r}")
        if self.misspelled > 1:
            raise ValueError(f"misspelled must be at most 1 in stage {self.name!r}")


@dataclass(frozen=True)
class Recipe:
    """The stages, the optimisers' settings and, in `decoder`, other sizes of the language model."""

    stages: tuple[Stage, ...]
    matrix_rate: float = 0.004
    other_rate: float = 0.003
    embedding_rate: float = 0.0003
    weight_decay: float = 0.01
    clip: float = 1.0
    decoder: dict[str, int] = field(default_factory=dict)
    evaluation_grids: tuple[tuple[int, int], ...] = ((8, 8), (12, 12))
    evaluation_questions: int = 1000

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe, by its path or the name of one that comes along; unknown fields are an error.

    Raises:
        FileNotFoundError: when there is no such recipe.
    """
    import yaml

    content = yaml.safe_load(find_recipe(path).read_text(encoding="utf-8"))
    content["stages"] = tuple(_stage(fields) for fields in content["stages"])
    if "evaluation_grids" in content:
        content["evaluation_grids"] = tuple(map(tuple, content["evaluation_grids"]))
    return Recipe(**content)


def _stage(fields: dict) -> Stage:
    tuples = {"grids": tuple(map(tuple, fields["grids"]))}
    if "rate" in fields:
        tuples["rate"] = tuple(fields["rate"])
    return Stage(**{**fields, **tuples})
