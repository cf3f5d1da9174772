"""Questions about pages as messages, and their score."""

from pathlib import Path

from PIL import Image

from glimpseprune.images import open_image
from glimpseprune.metrics import exact_match


def doc_to_visual(doc: dict, lmms_eval_specific_kwargs: dict) -> list[Image.Image]:
    """The page."""
    return [open_image(Path(lmms_eval_specific_kwargs["image_folder"], doc["image"]))]


def doc_to_messages(doc: dict, lmms_eval_specific_kwargs: dict) -> list[dict]:
    """One user turn: the page, then the question."""
    image = doc_to_visual(doc, lmms_eval_specific_kwargs)[0]
    content = [{"type": "image", "url": image}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """Exact match."""
    return {"exact_match": exact_match(results[0], doc["answer"])}
