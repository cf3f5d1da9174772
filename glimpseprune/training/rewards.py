"""Rewards of stage 2: plain functions of completions and what is known of their prompts.

Each takes lists with one entry a completion, by name, and returns one number each; trl calls them
with everything it knows, so they ignore what they do not need.
"""

from collections.abc import Callable, Mapping

from .. import metrics
from ..judge import Judge, JudgeConfig

Reward = Callable[..., list[float | None]]


def exact_match(completions: list[str], answer: list[str], **known) -> list[float]:
    """1 for the reference answer, else 0."""
    return _each(metrics.exact_match, completions, answer)


def anls(completions: list[str], answer: list[str], **known) -> list[float]:
    """Normalised edit similarity with the reference answer."""
    return _each(metrics.anls, completions, answer)


def relaxed_accuracy(completions: list[str], answer: list[str], **known) -> list[float]:
    """As `exact_match`, numbers within 5 %."""
    return _each(metrics.relaxed_accuracy, completions, answer)


def retention(retention: list[float], **known) -> list[float]:
    """The share of visual tokens that the prompt's mask dropped.

    Completions of one prompt share its mask, so within their group this is a constant, which the
    advantages of GRPO leave out.
    """
    return [1 - share for share in retention]


def judged(config: JudgeConfig) -> Reward:
    """A reward by a judge; None, which trl leaves out, where its reply holds no score."""
    asked = Judge(config)

    def judge(prompts: list[str], completions: list[str], answer: list[str], **known):
        return asked.scores(prompts, answer, completions)

    return judge


REWARDS: dict[str, Reward] = {
    each.__name__: each for each in (exact_match, anls, relaxed_accuracy, retention)
}


def build_rewards(weights: Mapping[str, object], judge: Mapping[str, object]) -> list[Reward]:
    """The reward functions that a recipe names, in its order.

    Args:
        weights: weight of each reward by name; `"judge"` or one of `REWARDS`.
        judge: fields of `JudgeConfig`, for the reward of that name.

    Raises:
        ValueError: naming a reward, a weight or a field that cannot be.
    """
    if not weights:
        raise ValueError("rewards: there must be one at least")
    for name, weight in weights.items():
        if name != "judge" and name not in REWARDS:
            raise ValueError(
                f"rewards: unknown reward {name}; known are judge, {', '.join(REWARDS)}"
            )
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ValueError(f"rewards: the weight of {name} must be a number, got {weight!r}")
    if judge and "judge" not in weights:
        raise ValueError("judge: there is no reward of that name; give it a weight under rewards")
    return [REWARDS[name] if name != "judge" else judged(_judge(judge)) for name in weights]


def _judge(fields: Mapping[str, object]) -> JudgeConfig:
    known = JudgeConfig.__dataclass_fields__
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"judge: unknown field {unknown[0]}")
    missing = [name for name in ("url", "model") if name not in fields]
    if missing:
        raise ValueError(f"judge: {missing[0]} is missing")
    return JudgeConfig(**fields)


def _each(metric: Callable, completions: list[str], answers: list[str]) -> list[float]:
    return [metric(each, answer) for each, answer in zip(completions, answers, strict=True)]
