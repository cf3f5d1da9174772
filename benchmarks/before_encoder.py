"""Before the encoder: what is left out, and what that does to answers.

    python -m benchmarks.before_encoder --output benchmarks/results/before_encoder.json \
        [--images FOLDER ...]

On the tiny world (test pages of two kinds: as full as those of training, and sparse as documents
are) every question is answered with all tokens and with the glimpse, with everything encoded and
without redundant patches. The tolerance is the widest of a few that costs no accuracy on validation
pages. Operations of the vision encoder are those of Qwen2.5-VL-7B's law at the kept share of a
5,074-token page, averaged over pages. With folders of images it also says what share of their
tokens stays, as they are, as JPEG files and with noise.
"""

import argparse
import io
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from benchmarks.efficiency.__main__ import describe_machine
from glimpseprune.data.visual_cot import read_visual_cot
from glimpseprune.evaluation import batches
from glimpseprune.images import open_image
from glimpseprune.loading import load_model, prepare
from glimpseprune.metrics import exact_match
from glimpseprune.portable import write_json
from glimpseprune.prefill_cost import QWEN2_5_VL_VISION
from glimpseprune.sample import Sample
from glimpseprune.tiny_world.dataset import write_pages
from glimpseprune.tiny_world.pages import PageSettings
from modeling_glimpseprune.redundant_patches import telling_tokens
from modeling_glimpseprune.stock import cache_of
from modeling_glimpseprune.visual_features import token_geometry

PAGES = {"full": PageSettings(), "sparse": PageSettings(filled=(0.1, 0.3))}
TOLERANCES = (16.0, 32.0, 48.0, 64.0)
QUESTIONS_A_PAGE = 4
PAPER_TOKENS = 5074
IMAGE_TOLERANCES = (0.0, 8.0, 16.0)
IMAGE_SIZES = {"shortest_edge": 4 * 28**2, "longest_edge": 16384 * 28**2}  # as published
MARGIN = 0.005  # of accuracy on validation pages that a tolerance may cost


def samples_of(settings: PageSettings, split: str, questions: int, seed: int) -> list[Sample]:
    """Questions about pages of the tiny world, images in memory; two a page on average."""
    with tempfile.TemporaryDirectory() as folder:
        pages = range(questions // 2 + 1)
        data = write_pages(Path(folder), split, pages, seed, settings, QUESTIONS_A_PAGE)
        rows = read_visual_cot(data, None)[:questions]
        images = {path: open_image(path) for path in dict.fromkeys(row.image for row in rows)}
    return [
        Sample(images[row.image], row.question, row.answer, path=row.image, number=number)
        for number, row in enumerate(rows)
    ]


def encoder_share(kept: float) -> float:
    """Operations of Qwen2.5-VL's encoder on a share of a page, over those on all of it."""
    return QWEN2_5_VL_VISION.cost(round(kept * PAPER_TOKENS)) / QWEN2_5_VL_VISION.cost(PAPER_TOKENS)


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    tolerance: float | None,
    glimpses: bool,
) -> dict[str, float]:
    """Accuracy, and the means of what was encoded and kept.

    Args:
        tolerance: of `redundant_patches`; None encodes everything.
        glimpses: whether the glimpse chooses; else all encoded tokens stay.
    """
    scores, encoded, kept, operations = [], [], [], []
    for batch in tqdm(list(batches(samples, 16)), leave=False):
        inputs = prepare(
            processor, [sample.image for sample in batch], [sample.question for sample in batch]
        )
        counts = model.model.visual_counts(**inputs)
        options = {"redundant_patches": False if tolerance is None else tolerance}
        if not glimpses:
            options["visual_keep_mask"] = torch.ones(sum(counts), dtype=torch.bool)
        output = model.generate(
            **inputs, **options, max_new_tokens=8, do_sample=False, return_dict_in_generate=True
        )
        completions = output.sequences[:, inputs["input_ids"].shape[1] :]
        texts = processor.batch_decode(completions, skip_special_tokens=True)
        record = cache_of(output).glimpse
        seen = torch.ones_like(record.keep_mask) if record.encoded is None else record.encoded
        shares = [part.float().mean().item() for part in seen.split(counts)]
        scores += [exact_match(text, each.answer) for text, each in zip(texts, batch, strict=True)]
        encoded += shares
        operations += map(encoder_share, shares)
        kept += [part.float().mean().item() for part in record.keep_mask.split(counts)]
    figures = {"accuracy": scores, "encoded": encoded, "encoder": operations, "kept": kept}
    return {name: sum(values) / len(values) for name, values in figures.items()}


class Report:
    """Rows of figures in a JSON file, each written when it is done; a second run goes on there.

    Args:
        path: of the file.
        settings: of the run.

    Raises:
        ValueError: when the file is of a run with other settings.
    """

    def __init__(self, path: Path, settings: dict):
        self.path, self.content = path, {"settings": settings}
        if path.exists():
            self.content = json.loads(path.read_text())
            if self.content["settings"] != settings:
                raise ValueError(
                    f"{path} holds rows measured with {self.content['settings']}, not with "
                    f"{settings}: name another file"
                )

    def row(self, place: tuple[str, ...], measure: Callable[..., dict], *arguments) -> dict:
        """The row at a place; measured, printed and written where it is missing."""
        group = self.content
        for part in place[:-1]:
            group = group.setdefault(part, {})
        if place[-1] not in group:
            group[place[-1]] = measure(*arguments)
            print(*place, json.dumps(group[place[-1]]), flush=True)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.content)
        return group[place[-1]]


def variants(image: Image.Image) -> dict[str, Image.Image]:
    """An image as it is, as a JPEG file, and with noise of three grey levels."""
    coded = io.BytesIO()
    image.save(coded, "JPEG", quality=75)
    pixels = np.asarray(image, dtype=np.float32)
    noise = np.random.default_rng(0).normal(0, 3, pixels.shape)
    noisy = Image.fromarray((pixels + noise).round().clip(0, 255).astype(np.uint8))
    return {"as it is": image, "JPEG, quality 75": Image.open(coded), "noise, sigma 3": noisy}


def kept_of_images(processor: ProcessorMixin, folder: Path) -> dict:
    """Share of tokens that stays, by variant and tolerance, the mean over a folder's images."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    statistics = processor.image_processor.image_mean, processor.image_processor.image_std
    shares: dict[str, dict[str, list[float]]] = {}
    tokens = []
    for path in tqdm(paths, desc=folder.name, leave=False):
        for name, image in variants(open_image(path)).items():
            features = processor.image_processor([image], size=IMAGE_SIZES, return_tensors="pt")
            (layout,) = processor.image_layouts(features)
            (grid,) = layout.grids
            geometry = token_geometry(torch.tensor([[1, *grid]]), [layout.placeholders])
            tokens.append(layout.placeholders)
            for tolerance in IMAGE_TOLERANCES:
                pixels = features["pixel_values"]
                telling = telling_tokens(pixels, geometry, tolerance, statistics)
                of_variant = shares.setdefault(name, {})
                of_variant.setdefault(f"{tolerance:g}", []).append(telling.float().mean().item())
    means = {
        name: {tolerance: sum(each) / len(each) for tolerance, each in of_variant.items()}
        for name, of_variant in shares.items()
    }
    return {"images": len(paths), "tokens": [min(tokens), max(tokens)], "kept": means}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder or Hub repository (default: the tiny model)")
    parser.add_argument("--questions", type=int, default=1000, help="0: images alone")
    parser.add_argument("--validation-questions", type=int, default=400)
    parser.add_argument("--images", type=Path, nargs="*", default=[])
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    model, processor = load_model(arguments.model)
    report = Report(
        arguments.output,
        describe_machine("cpu")
        | {
            "questions": arguments.questions,
            "validation_questions": arguments.validation_questions,
        },
    )
    for name, settings in PAGES.items() if arguments.questions else ():
        answer = partial(answers, model, processor)
        samples = samples_of(settings, "validation", arguments.validation_questions, 0)
        base = report.row(("validation", name, "all"), answer, samples, None, True)
        held = [
            tolerance
            for tolerance in TOLERANCES
            if report.row(("validation", name, f"{tolerance:g}"), answer, samples, tolerance, True)[
                "accuracy"
            ]
            >= base["accuracy"] - MARGIN
        ]
        samples = samples_of(settings, "test", arguments.questions, 0)
        for chosen in dict.fromkeys([None, max(held, default=0.0), 0.0]):
            for glimpses in (False, True):
                key = f"{'all' if chosen is None else f'{chosen:g}'}, "
                key += "glimpse" if glimpses else "all tokens"
                report.row(("pages", name, key), answer, samples, chosen, glimpses)
    for folder in arguments.images:
        report.row(("images", folder.name), kept_of_images, processor, folder)


if __name__ == "__main__":
    main()
