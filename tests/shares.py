"""Which cases run on which release of transformers, and which ones in the fast suite."""

import re
from zlib import crc32

import pytest

# Modules that say little of a release of transformers: `--older-release` leaves them out. All
# others run on every release that scripts/test.sh knows.
NEWEST_ONLY = {
    "test_answer",
    "test_answer_ray",
    "test_base_training",
    "test_baselines",
    "test_calibration",
    "test_cost",
    "test_deep_base",
    "test_deepspeed",
    "test_demo",
    "test_demo_browser",
    "test_docs",
    "test_efficiency",
    "test_evaluation",
    "test_families",
    "test_harnesses",
    "test_hub_configs",
    "test_images",
    "test_inspection",
    "test_judge",
    "test_look_ahead_reference",
    "test_look_ahead_uses",
    "test_look_cost",
    "test_look_once_benchmark",
    "test_measured_generation",
    "test_metrics",
    "test_packaging",
    "test_publishing_robustness",
    "test_rehearsal",
    "test_releases",
    "test_report",
    "test_sampled_masks",
    "test_second_questions",
    "test_selection",
    "test_serving",
    "test_soft_mask",
    "test_stage1_early",
    "test_stage1_looks",
    "test_stage1_objectives",
    "test_stage1_redundant",
    "test_stage2_llava",
    "test_stage2_trainer",
    "test_strips",
    "test_tiny_world",
    "test_training_benchmarks",
    "test_visual_cot",
}

# Modules of which the older releases share out the cases among them. Those that run whole on every
# release load, generate, deploy and answer by the commands.
SHARED_OUT = {
    "test_arguments",
    "test_assisted_decoding",
    "test_before_encoder",
    "test_configuration",
    "test_conversion",
    "test_conversion_refusals",
    "test_golden",
    "test_invariants",
    "test_llava",
    "test_llava_bases",
    "test_look_ahead",
    "test_prefix",
    "test_prefix_uses",
    "test_processor_images",
    "test_publishing",
    "test_quantisation",
    "test_qwen3_vl",
    "test_reported_troubles",
    "test_scores",
    "test_serving_assumptions",
    "test_serving_parts",
    "test_stage1_trainer",
    "test_stock_calls",
    "test_stock_contract",
    "test_stock_contract_generation",
    "test_stock_contract_weights",
    "test_training_forward",
    "test_trl_trainers",
}

# Modules about what the two LLaVA families do not share, or about loading them: both run there,
# always. Elsewhere each case runs for one of the two (see `is_left_to_sibling`).
BOTH_LLAVAS = {
    "test_automatic_classes",
    "test_deployment",
    "test_golden",
    "test_hub_configs",
    "test_llava",
    "test_llava_bases",
    "test_stage2_llava",
    "test_stock",
}


def is_left_to_sibling(item: pytest.Item, names: set[str]) -> bool:
    """Whether a case of one of the two LLaVA families is left to the same case of the other.

    They share their language model and all of our code but for the views of an image. Which of
    the two runs follows from the case's name; with `-m slow` the other does.
    """
    families = {"llava", "llava_next"} & set(re.split(r"[\[\]-]", item.nodeid))
    if len(families) != 1 or item.path.stem in BOTH_LLAVAS:
        return False
    (family,) = families
    case = re.sub(r"(?<=[\[-])llava(_next)?(?=[\]-])", "llava{}", item.nodeid)
    both = [case.replace("{}", suffix) for suffix in ("", "_next")]
    if not names.issuperset(both):
        return False
    return (crc32(case.encode()) % 2 == 0) == (family == "llava")


def is_shared_with(item: pytest.Item, number: int, count: int) -> bool:
    """Whether the Nth of so many older releases runs a test.

    Every case of a wide module runs on the newest release and on one older one. Which one follows
    from the case's name, so that it stays where it is when others are added.
    """
    if item.get_closest_marker("newest"):
        return False
    if item.path.stem not in SHARED_OUT:
        return True
    return crc32(item.name.encode()) % count == number - 1
