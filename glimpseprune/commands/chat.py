"""`glimpseprune chat`: question after question about images that are looked at once."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

from .model_arguments import add_model_arguments

SINGLE_TURNS = "the tiny model knows single turns only: each question is asked by itself"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        help="image file, as often as there are images (default: a page of the tiny world)",
    )
    parser.add_argument(
        "--single-turns",
        action="store_true",
        help="ask each question by itself, not as a conversation",
    )
    parser.add_argument("--prune-layer", type=int)
    parser.add_argument("--prune-threshold", type=float)
    parser.add_argument("--max-keep-ratio", type=float)
    parser.add_argument("--min-keep-tokens", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=256)


def run(arguments: argparse.Namespace) -> int:
    from modeling_glimpseprune.stock import cache_of, given_cache

    from ..images import open_image
    from ..loading import load_model
    from ..package_files import SAMPLE_PAGE

    images = [open_image(path) for path in arguments.image or [SAMPLE_PAGE]]
    model, processor = load_model(arguments.model, dtype=arguments.dtype)
    forgets = arguments.single_turns or arguments.model is None
    if forgets and not arguments.single_turns:
        print(SINGLE_TURNS)
    names = ("prune_threshold", "max_keep_ratio", "min_keep_tokens")
    settings = {name: getattr(arguments, name) for name in names}
    settings = {name: value for name, value in settings.items() if value is not None}
    start = perf_counter()
    inputs = processor(
        images=images, text=prompt_of(processor, [], "?", len(images)), return_tensors="pt"
    ).to(model.device)
    prefix = model.look(**inputs, prune_layer=arguments.prune_layer)
    tokens = sum(prefix.visual_counts(1))
    print(f"looked at {len(images)} image(s), {tokens} visual tokens: {_since(start)}")
    turns: list[tuple[str, str]] = []
    for question in questions():
        start = perf_counter()
        text = prompt_of(processor, [] if forgets else turns, question, len(images))
        inputs = processor(text=text, prefix=prefix).to(model.device)
        generated = model.generate(
            **inputs,
            **given_cache(prefix),
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            **settings,
        )
        completion = generated.sequences[:, inputs["input_ids"].shape[1] :]
        answer = processor.batch_decode(completion, skip_special_tokens=True)[0].strip()
        record = cache_of(generated).glimpse
        print(answer)
        print(f"  kept {record.kept} of {record.total} ({record.retention:.1%}), {_since(start)}")
        turns.append((question, answer))
    return 0


def prompt_of(processor, turns: list[tuple[str, str]], question: str, num_images: int) -> str:
    """The text of a conversation that begins with images and ends with a question.

    Args:
        turns: questions and answers before it.
    """
    messages = []
    for asked, answer in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": asked}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
    messages[0]["content"] = [{"type": "image"}] * num_images + messages[0]["content"]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def questions() -> Iterator[str]:
    """Lines of the standard input, up to an empty one or its end."""
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if not line:
            return
        yield line


def _since(start: float) -> str:
    return f"{perf_counter() - start:.2f} s"
