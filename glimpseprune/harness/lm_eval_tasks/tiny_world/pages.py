"""Pages as images, and the score of an answer."""

from pathlib import Path

from PIL import Image

from glimpseprune.images import open_image
from glimpseprune.metrics import exact_match

IMAGE_FOLDER = Path("runs/pages")


def doc_to_image(doc: dict) -> list[Image.Image]:
    """The page that a question is about."""
    return [open_image(IMAGE_FOLDER / doc["image"])]


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """Exact match."""
    return {"exact_match": exact_match(results[0], doc["answer"])}
