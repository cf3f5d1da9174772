"""`glimpseprune ask`: answer a question about an image, prune on the way, draw what was kept."""

import argparse
from pathlib import Path

from .model_arguments import add_model_arguments

SAMPLE_QUESTION = "What is the value of CS?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--image", type=Path, help="image file (default: a page of the tiny world)")
    parser.add_argument("--question", default=SAMPLE_QUESTION)
    parser.add_argument("--no-prune", action="store_true", help="answer with all visual tokens")
    parser.add_argument("--prune-threshold", type=float)
    parser.add_argument("--max-keep-ratio", type=float)
    parser.add_argument("--min-keep-tokens", type=int)
    parser.add_argument(
        "--redundant-patches",
        type=float,
        metavar="GREY_LEVELS",
        help="leave out patches that their neighbours predict within so many grey levels",
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("glimpse.png"), help="picture to write")


def run(arguments: argparse.Namespace) -> int:
    from modeling_glimpseprune.stock import cache_of

    from ..images import open_image
    from ..loading import load_model, prepare
    from ..package_files import SAMPLE_PAGE

    image = open_image(arguments.image or SAMPLE_PAGE)
    model, processor = load_model(arguments.model, dtype=arguments.dtype)
    inputs = prepare(processor, [image], [arguments.question]).to(model.device)
    names = ("prune_threshold", "max_keep_ratio", "min_keep_tokens", "redundant_patches")
    settings = {name: getattr(arguments, name) for name in names}
    generated = model.generate(
        **inputs,
        max_new_tokens=arguments.max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        prune=not arguments.no_prune,
        **{name: value for name, value in settings.items() if value is not None},
    )
    completion = generated.sequences[:, inputs["input_ids"].shape[1] :]
    print(f"answer: {processor.batch_decode(completion, skip_special_tokens=True)[0].strip()}")
    if arguments.no_prune:
        total = sum(model.model.visual_counts(**inputs))
        print(f"visual tokens: all {total} kept")
        return 0
    record = cache_of(generated).glimpse
    print(f"visual tokens: kept {record.kept} of {record.total} ({record.retention:.1%})")
    if record.encoded is not None:
        print(f"encoded: {int(record.encoded.sum())} (blue in the picture: left out)")
    box = processor.visible_box(image.width, image.height)
    if box != (0, 0, image.width, image.height):
        image = image.crop(tuple(map(round, box)))
        print(f"seen of the image: {tuple(map(round, box))} (the model cuts or pads it)")
    draw(image, record.visuals, arguments.output)
    print(f"picture: {arguments.output}")
    return 0


def draw(image, visuals: list, output: Path) -> None:
    """Write the picture of one image's glimpse, its views one below the other.

    A view without tokens is left out.
    """
    from ..visualisation import draw_glimpse, stacked

    output.parent.mkdir(parents=True, exist_ok=True)
    views = [
        draw_glimpse(image, visual.keep_mask, visual.importance, visual.grid[1:], visual.encoded)
        for visual in visuals
        if visual.total
    ]
    stacked(views).save(output)
