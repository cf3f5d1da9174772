"""Pictures of pages with the tokens that were kept."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from glimpseprune.loading import prepare
from glimpseprune.sample import Sample
from glimpseprune.visualisation import draw_glimpse

from .records import Record

PAGES, WIDTH, COLOURS = 6, 480, 40


def choose(records: Sequence[Record], samples: dict[int, Sample]) -> list[Record]:
    """Answers to show: the first right one of each group, then the first wrong ones."""
    right: dict[str, Record] = {}
    for record in records:
        if record.score == 1.0:
            right.setdefault(record.group, record)
    wrong = [record for record in records if record.score < 1.0]
    chosen = list(right.values())[: PAGES - 2]
    return [*chosen, *wrong[: PAGES - len(chosen)]]


def draw_gallery(
    model, processor, records: Sequence[Record], samples: dict[int, Sample], folder: Path
) -> list[tuple[str, Record, Sample]]:
    """Write one picture a record: dropped tokens dimmed, and beside it the scores.

    Returns:
        File, record and question of each.
    """
    drawn = []
    for record in choose(records, samples):
        sample = samples[record.number]
        inputs = prepare(processor, [sample.image], [sample.question]).to(model.device)
        visual = model.glimpse(**inputs).visuals[-1]
        box = tuple(map(round, processor.visible_box(*sample.image.size)))
        picture = draw_glimpse(
            sample.image.crop(box),
            visual.keep_mask,
            visual.importance,
            visual.grid[1:],
            visual.encoded,
        )
        file = f"page_{record.number}.png"
        _small(picture).save(folder / file, optimize=True)
        drawn.append((file, record, sample))
    return drawn


def _small(picture: Image.Image) -> Image.Image:
    height = round(picture.height * WIDTH / picture.width)
    return picture.resize((WIDTH, height), Image.Resampling.LANCZOS).quantize(COLOURS)
