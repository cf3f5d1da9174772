"""Tiny random models and prompts that the tests share.

`build_models` makes a stock model and a GlimpsePrune model of one family with the same base
weights, in float32; `build_batch` turns short descriptions of prompts into model inputs. Both are
plain functions, offered to the tests as fixtures of the same names, for the family that the fixture
`family` names.
"""

import copy
import math
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import transformers
from fresh_process import run_fresh
from llava_prompts import config_fields, llava_image, llava_next_image, next_config_fields
from qwen3_prompts import qwen3_config_fields, qwen3_frames
from shares import NEWEST_ONLY, is_left_to_sibling, is_shared_with
from stage1_data import recipe_of, write_base, write_data
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from glimpseprune.families import LLAVA, LLAVA_NEXT, QWEN2_5_VL, QWEN3_VL, Family
from glimpseprune.training.base import load_for_training
from glimpseprune.training.stage1 import train_stage1

pytest.register_assert_rewrite("generation_checks")  # so that a failure shows values

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
PAD_TOKEN, VOCABULARY = 0, 200
FIRST_SPECIAL_TOKEN = 190  # text tokens are 1..189
IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END = 190, 191, 192, 193
PATCH, MERGE, TEMPORAL_PATCH = 4, 2, 2
LOOK_LAYER = 3  # of the models that `make_model` makes
TEXT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids")


def pytest_addoption(parser):
    parser.addoption(
        "--older-release",
        metavar="N/ALL",
        help="run what depends on the release of transformers, and of wide modules the share of "
        "the Nth of ALL older releases (1/1: all)",
    )
    parser.addoption("--screenshot", help="where test_demo_browser puts a picture of the page")


def pytest_ignore_collect(collection_path, config):
    if config.getoption("--older-release") and collection_path.stem in NEWEST_ONLY:
        return True  # False would overrule other plugins


@pytest.hookimpl(tryfirst=True)  # before those marked slow are left out
def pytest_collection_modifyitems(config, items):
    names = {item.nodeid for item in items}
    for item in items:
        if is_left_to_sibling(item, names):
            item.add_marker(pytest.mark.slow)
    if not (share := config.getoption("--older-release")):
        return
    number, count = map(int, share.split("/"))
    left_out = [item for item in items if not is_shared_with(item, number, count)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


class Models(NamedTuple):
    """A stock model and a GlimpsePrune model with the same base weights, both in `eval` mode."""

    stock: PreTrainedModel
    pruned: PreTrainedModel


class FamilyOfTests(NamedTuple):
    """One family as the tests build it.

    Args:
        family: our classes.
        stock_config_class, stock_class: the stock ones.
        config_fields: makes keyword arguments of a tiny stock configuration.
        build_visual: makes one image or video of a prompt from its description: token ids, pixel
            inputs, and `(kind, grid)` of each view.
    """

    family: Family
    stock_config_class: type[PretrainedConfig]
    stock_class: type[PreTrainedModel]
    config_fields: Callable[..., dict]
    build_visual: Callable[[tuple, torch.Generator], tuple[list[int], dict, list]]


class Batch(NamedTuple):
    """Inputs of several prompts, left-padded together and one by one.

    Args:
        inputs: keyword arguments of `forward` and `generate` for the whole batch.
        rows: the same for each prompt alone, without padding.
        visual_counts: visual tokens of each prompt.
        visuals: `(row, kind, (frames, height, width))` of each view of each image and video.
    """

    inputs: dict
    rows: list[dict]
    visual_counts: list[int]
    visuals: list[tuple]

    @property
    def num_visual(self) -> int:
        return sum(self.visual_counts)

    def split(self, visual: torch.Tensor) -> list[torch.Tensor]:
        """Cut a `(num_visual, ...)` tensor in prompt order into one piece a row."""
        return list(visual.split(self.visual_counts))


def build_config_fields(
    hidden_size: int = 32,
    num_layers: int = 3,
    num_heads: int = 4,
    num_key_value_heads: int = 2,
    vision_depth: int = 3,
    window: int = 2,
    full_attention_blocks: tuple[int, ...] = (1,),
) -> dict:
    """Keyword arguments of a tiny stock configuration; `window` is in visual tokens a side."""
    rotary = hidden_size // num_heads // 2
    section = [rotary // 4, (rotary - rotary // 4) // 2]
    section.append(rotary - sum(section))
    text = dict(
        vocab_size=VOCABULARY, hidden_size=hidden_size, intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers, num_attention_heads=num_heads, rms_norm_eps=1e-6,
        num_key_value_heads=num_key_value_heads, max_position_embeddings=2048,
        use_sliding_window=False, max_window_layers=num_layers, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=PAD_TOKEN, rope_theta=10_000.0,
        rope_scaling={"type": "mrope", "mrope_section": section},
    )  # fmt: skip
    vision = dict(
        depth=vision_depth, hidden_size=16, intermediate_size=32, num_heads=2, in_channels=3,
        out_hidden_size=hidden_size, patch_size=PATCH, spatial_patch_size=PATCH,
        spatial_merge_size=MERGE, temporal_patch_size=TEMPORAL_PATCH, tokens_per_second=2,
        window_size=window * MERGE * PATCH, fullatt_block_indexes=list(full_attention_blocks),
    )  # fmt: skip
    return dict(
        text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN, vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END, tie_word_embeddings=False,
    )  # fmt: skip


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Fill weights so that attention, scores and greedy tokens are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name or "ln_q" in name:
            noise = 0.2 * noise + (0.0 if name.endswith("bias") else 1.0)
        elif name.endswith("bias"):
            noise = 0.3 * noise
        elif "embed" not in name:
            noise = noise * 1.5 / math.sqrt(weight[0].numel())
        weight.data.copy_(noise)


def build_models(
    seed: int = 0,
    attn_implementation: str = "sdpa",
    glimpse: dict | None = None,
    family: str = "qwen2_5_vl",
    **sizes,
) -> Models:
    """Models of their own; `sizes` as in `build_config_fields`, `glimpse` as in the config."""
    classes = FAMILIES[family]
    fields = classes.config_fields(**sizes)
    fields["attn_implementation"] = attn_implementation
    stock = classes.stock_class(classes.stock_config_class(**copy.deepcopy(fields))).eval()
    randomise(stock, seed)
    stock.lm_head.weight.data[FIRST_SPECIAL_TOKEN:] = 0  # answers are text
    small = {"predictor_hidden_size": 16, "predictor_condition_size": 16, "predictor_num_heads": 2}
    config = classes.family.config_class(**fields, **(small | (glimpse or {})))
    pruned = classes.family.model_class(config).eval()
    missing, unexpected = pruned.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("model.glimpse.") for name in missing)
    randomise(pruned.model.glimpse, seed + 1)
    pruned.model.glimpse.predictor.output_projection.weight.data *= 0.2  # no saturated sigmoids
    pruned.model.glimpse.trained.fill_(True)
    for model in (stock, pruned):
        model.generation_config.pad_token_id = PAD_TOKEN
        model.generation_config.suppress_tokens = list(range(FIRST_SPECIAL_TOKEN, VOCABULARY))
    return Models(stock, pruned)


def build_batch(prompts: list[list], seed: int = 0, family: str = "qwen2_5_vl") -> Batch:
    """Random inputs for described prompts.

    Args:
        prompts: for each prompt its parts in order: an integer is that many text tokens,
            `(height, width)` an image and `(frames, height, width)` a video, in visual tokens (or
            what the family makes of it).
        seed: of token ids and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    build_visual = FAMILIES[family].build_visual
    rows, counts, visuals = [], [], []
    for index, parts in enumerate(prompts):
        row, views = _build_row(parts, generator, build_visual)
        rows.append(row)
        grids = [(kind, (1, *grid)[-3:]) for kind, grid in views]
        counts.append(sum(math.prod(grid) for _, grid in grids))
        visuals += [(index, kind, grid) for kind, grid in grids]
    return Batch(pad_together(rows), rows, counts, visuals)


def _build_row(parts: list, generator: torch.Generator, build_visual: Callable) -> tuple:
    ids, pixels, views = [], [], []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(1, FIRST_SPECIAL_TOKEN, (part,), generator=generator).tolist()
            continue
        tokens, inputs, views_of_part = build_visual(part, generator)
        ids += tokens
        pixels.append(inputs)
        views += views_of_part
    row = {"input_ids": torch.tensor([ids])}
    row["attention_mask"] = torch.ones_like(row["input_ids"])
    if TRANSFORMERS_5 and build_visual in (build_qwen_visual, build_qwen3_visual):
        row["mm_token_type_ids"] = _token_types(row["input_ids"])
    return row | _concatenate(pixels), views


def build_qwen_visual(part: tuple, generator: torch.Generator) -> tuple[list[int], dict, list]:
    """See `FamilyOfTests`."""
    kind, token = ("image", IMAGE_TOKEN) if len(part) == 2 else ("video", VIDEO_TOKEN)
    frames, height, width = (1, *part)[-3:]
    count = frames * height * width
    values = 3 * TEMPORAL_PATCH * PATCH**2
    pixels = torch.randn(count * MERGE**2, values, generator=generator)
    grid = torch.tensor([[frames, height * MERGE, width * MERGE]])
    suffix = "" if kind == "image" else "_videos"
    inputs = {f"pixel_values{suffix}": pixels, f"{kind}_grid_thw": grid}
    return [VISION_START, *[token] * count, VISION_END], inputs, [(kind, part)]


def build_qwen3_visual(part: tuple, generator: torch.Generator) -> tuple[list[int], dict, list]:
    """See `FamilyOfTests`."""
    ids, inputs, views = build_qwen_visual(part, generator)
    if len(part) == 3:
        ids = qwen3_frames(ids, part[0], generator)
    return ids, inputs, views


FAMILIES = {
    "qwen2_5_vl": FamilyOfTests(
        QWEN2_5_VL,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        build_config_fields,
        build_qwen_visual,
    ),
    "qwen3_vl": FamilyOfTests(
        QWEN3_VL,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        partial(qwen3_config_fields, VOCABULARY, PAD_TOKEN),
        build_qwen3_visual,
    ),
    "llava": FamilyOfTests(
        LLAVA,
        LlavaConfig,
        LlavaForConditionalGeneration,
        partial(config_fields, VOCABULARY, PAD_TOKEN),
        llava_image,
    ),
    "llava_next": FamilyOfTests(
        LLAVA_NEXT,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        partial(next_config_fields, VOCABULARY, PAD_TOKEN),
        llava_next_image,
    ),
}


def sees_videos(family: str) -> bool:
    """Whether prompts of a family may hold videos."""
    return hasattr(FAMILIES[family].stock_class, "get_video_features")


def has_windows(family: str) -> bool:
    """Whether a family's vision encoder attends within windows."""
    return FAMILIES[family].family.config_class.has_vision_windows


def counts_from_ids(family: str) -> bool:
    """Whether a family's rotary positions are derived from ids."""
    return FAMILIES[family].family.model_class.backbone_class.positions_from_ids


def _token_types(input_ids: torch.Tensor) -> torch.Tensor:
    return (input_ids == IMAGE_TOKEN).int() + 2 * (input_ids == VIDEO_TOKEN).int()


def _concatenate(inputs: list[dict]) -> dict:
    names = dict.fromkeys(name for each in inputs for name in each)
    return {name: torch.cat([each[name] for each in inputs if name in each]) for name in names}


def pad_together(rows: list[dict]) -> dict:
    """Inputs of a batch from those of its prompts."""
    length = max(row["input_ids"].shape[1] for row in rows)
    text = [name for name in rows[0] if name in TEXT_INPUTS]
    inputs = {name: torch.cat([_pad_left(row[name], length) for row in rows]) for name in text}
    pixels = [{name: row[name] for name in row if name not in TEXT_INPUTS} for row in rows]
    return inputs | _concatenate(pixels)


def _pad_left(row: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(row, (length - row.shape[1], 0), value=PAD_TOKEN)


@pytest.fixture
def family() -> str:
    """The family under test; modules that test several put a fixture of this name in its place."""
    return "qwen2_5_vl"


@pytest.fixture(name="build_models")
def build_models_fixture(family):
    return partial(build_models, family=family)


@pytest.fixture
def shared_models(family):
    """`build_models` with a memory, for tests that leave the models as they found them."""

    def shared(seed=0, attn_implementation="sdpa", glimpse=None, **sizes) -> Models:
        glimpse, sizes = _freeze(glimpse or {}), _freeze(sizes)
        return _remembered_models(family, seed, attn_implementation, glimpse, sizes)

    return shared


@cache
def _remembered_models(family: str, seed: int, attention: str, glimpse, sizes) -> Models:
    return build_models(seed, attention, _thaw(glimpse), family, **_thaw(sizes))


def _freeze(fields: dict) -> tuple:
    return tuple(
        (name, tuple(value) if isinstance(value, list) else value) for name, value in fields.items()
    )


def _thaw(fields: tuple) -> dict:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields}


@pytest.fixture
def make_model(shared_models):
    """A model whose glimpse looks at layer `LOOK_LAYER` of 5, by the layer it prunes at."""

    def make(prune_layer: int = LOOK_LAYER, seed: int = 4, **glimpse) -> PreTrainedModel:
        fields = {"glimpse_layer": LOOK_LAYER, "prune_layer": prune_layer} | glimpse
        return shared_models(seed, glimpse=fields, num_layers=5).pruned

    return make


@pytest.fixture(name="build_batch")
def build_batch_fixture(family):
    return partial(build_batch, family=family)


@pytest.fixture(autouse=True)
def settings_of_its_own(monkeypatch):
    """transformers leaves some settings of one training run in the environment of the next."""
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP"):
        monkeypatch.setenv(name, "")  # so that the end of the test forgets what a run sets
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def verification_in_forks(monkeypatch):
    """Conversions called here verify in processes that are forked; those of commands do not."""

    def run(command: list[str], *, env: dict, cwd: Path, **kwargs):
        return run_fresh(*command[1:], cwd=cwd, env=env)

    if (verification := sys.modules.get("conversion.verification")) is not None:
        monkeypatch.setattr(verification, "subprocess", SimpleNamespace(run=run))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny random stock model to train on."""
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six questions to train on."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def glimpsing(base, data, tmp_path_factory):
    """A repository that stage 2 starts from."""
    from stage2_data import write_glimpsing

    return write_glimpsing(base, data, tmp_path_factory.mktemp("repository") / "stage1")


@pytest.fixture(scope="module")
def loaded(glimpsing):
    """Its model and processor."""
    model, processor, _ = load_for_training(str(glimpsing))
    processor.tokenizer.padding_side = "left"
    return model.eval(), processor


@pytest.fixture
def make_stage2_recipe(glimpsing, data, tmp_path):
    """Makes recipes of short runs of stage 2."""
    from stage2_data import stage2_recipe_of

    def make(output="adapter", **overrides):
        return stage2_recipe_of(glimpsing, data, tmp_path / output, **overrides)

    return make


@pytest.fixture(scope="module")
def late(base, data, tmp_path_factory):
    """A repository with a glimpse that was trained to be read late."""
    recipe = recipe_of(base, data, tmp_path_factory.mktemp("late") / "trained")
    train_stage1(recipe)
    return recipe.output
