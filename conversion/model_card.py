"""The model card of a repository: metadata, settings, measurements, licence, citation."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

import yaml

from glimpseprune.hub.shards import ConversionError, read_json

TEMPLATE = Path(__file__).with_name("model_card.md")
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*\n", re.DOTALL)
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
LICENCE_FIELDS = ("license", "license_name", "license_link")
RECIPE_FIELDS = ("learning_rate", "num_train_epochs", "max_steps", "seed")


@dataclass(frozen=True)
class ModelCard:
    """What a card says beside what the configuration tells.

    Attributes:
        title: headline.
        repository: Hub id in the card's example.
        licence: identifier as the Hub knows it; default: the base card's.
        measurements: a file that `glimpseprune evaluate --output` wrote.
        training: how the glimpse was trained, a sentence.
        training_summary: content of a run's `training_summary.json`.
        trained: whether it was at all.
    """

    title: str = "GlimpsePrune"
    repository: str = "path/to/this/repository"
    licence: str | None = None
    measurements: Path | None = None
    training: str = "Not recorded."
    training_summary: Mapping[str, object] | None = None
    trained: bool = True


def base_licence(card: Path) -> dict[str, str]:
    """What the metadata of the base's card says of its licence; empty when it says nothing."""
    if not card.exists():
        return {}
    found = FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
    try:
        metadata = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        metadata = None
    if not isinstance(metadata, dict):
        return {}
    return {name: str(metadata[name]) for name in LICENCE_FIELDS if metadata.get(name)}


def render_card(card: ModelCard, config: Mapping[str, object], licence: Mapping[str, str]) -> str:
    """The text of README.md.

    Args:
        card: what to say.
        config: content of the repository's config.json.
        licence: the base's, as `base_licence` found it.

    Raises:
        ConversionError: when the measurements cannot be read.
    """
    if card.licence:
        licence = {"license": card.licence}
    base = config["glimpse_base"]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        metadata=_metadata(config, licence),
        title=card.title,
        repository=card.repository,
        summary=_summary(base, card.trained),
        contents=_contents(base),
        settings=_settings(config),
        measurements=_measurements(card.measurements),
        training=_training(card),
        licence=_licence(base, licence),
    )


def _metadata(config: Mapping[str, object], licence: Mapping[str, str]) -> str:
    repository = config["glimpse_base"]["repository"]
    metadata: dict[str, object] = dict(licence) or {"license": "other"}
    if repository and HUB_ID.fullmatch(repository):
        metadata["base_model"] = repository
    metadata["library_name"] = "transformers"
    metadata["pipeline_tag"] = "image-text-to-text"
    family = str(config["model_type"]).removeprefix("glimpseprune_")
    metadata["tags"] = ["glimpseprune", "visual-token-pruning", family, "arxiv:2508.01548"]
    return yaml.safe_dump(metadata, sort_keys=False).rstrip()


def _summary(base: Mapping[str, object], trained: bool) -> str:
    origin = f"`{base['repository']}`" if base["repository"] else "a vision-language model"
    if not trained:
        return (
            f"{origin} with places for a glimpse token and a visual importance predictor, which "
            "**are not trained yet**: without weights from training `generate()` refuses to prune, "
            "and `prune=False` and a mask of your own are what works."
        )
    return (
        f"{origin} with a trained glimpse token and visual importance predictor: `generate()` "
        "glances at the image once, scores its visual tokens for the question at hand, and goes on "
        "without those nobody asked about, in every layer and in the cache."
    )


def _contents(base: Mapping[str, object]) -> str:
    if base["included"]:
        return "This repository is complete: base and glimpse weights."
    at = f" at revision `{base['revision']}`" if base["revision"] else ""
    return (
        "This repository holds the glimpse weights alone; loading it also fetches the base "
        f"`{base['repository']}`{at}."
    )


def _settings(config: Mapping[str, object]) -> str:
    rows = {
        "glimpse layer K (0-based)": config["glimpse_layer"],
        "prune_threshold": config["prune_threshold"],
        "max_keep_ratio": config["max_keep_ratio"],
        "min_keep_tokens": config["min_keep_tokens"],
        "predictor width": config["predictor_hidden_size"],
        "vision layers": ", ".join(map(str, config["vision_layers"] or [])),
    }
    if config.get("prune_layer") is not None:
        rows["prune layer P (tokens are dropped there, the glimpse is read ahead)"] = config[
            "prune_layer"
        ]
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _measurements(path: Path | None) -> str:
    if path is None:
        return "None were made with these files."
    content = read_json(path)
    lines = ["| setting | accuracy | retention | questions |", "|---|---|---|---|"]
    try:
        for name, groups in content["results"].items():
            row = groups["all"]
            figures = f"{row['accuracy']:.4f} | {row['retention']:.4f} | {row['questions']}"
            lines.append(f"| {name} | {figures} |")
        settings = "; ".join(f"{name}: {value}" for name, value in content["settings"].items())
    except (KeyError, TypeError, AttributeError) as error:
        raise ConversionError(
            f"{path} is not what `glimpseprune evaluate --output` writes: no {error}"
        ) from error
    lines += ["", f"Measured by `glimpseprune evaluate` ({settings})."]
    return "\n".join(lines)


def _training(card: ModelCard) -> str:
    if not card.training_summary:
        return card.training
    training = card.training_summary.get("training") or {}
    facts = {name: training[name] for name in RECIPE_FIELDS if name in training}
    facts |= {
        name: card.training_summary[name]
        for name in ("questions", "steps", "epochs", "trained_parameters")
        if name in card.training_summary
    }
    listed = ", ".join(f"{name} {json.dumps(value)}" for name, value in facts.items())
    return f"{card.training} {listed}.\n\n`training_summary.json` holds all settings and figures."


def _licence(base: Mapping[str, object], licence: Mapping[str, str]) -> str:
    name = licence.get("license_name") or licence.get("license")
    if name is None:
        return "The base's licence holds for these weights; its card did not state one."
    return f"The weights: {name}, as the base's. The code: Apache-2.0."
