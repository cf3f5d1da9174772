"""What a session shows, in HTML: all that people and models wrote in it is escaped."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from io import BytesIO
from typing import NamedTuple

import torch
from PIL import Image

from modeling_glimpseprune.glimpse_record import GlimpseRecord

from ..answering.results import sentence_of
from ..visualisation import dim_dropped, heat_map, stacked
from .session import Answer, Session, Settings

LONGEST_SIDE = 768  # of a picture, in pixels; a token is larger than a pixel of it


class Shown(NamedTuple):
    """What stands in each part of the page, as HTML."""

    trouble: str
    answer: str
    kept: str
    pictures: str
    whole: str
    earlier: str


def shown(session: Session, settings: Settings, trouble: str = "") -> Shown:
    """All that the page shows of a session.

    Args:
        settings: those of the sliders.
        trouble: a sentence that says what is wrong, if anything is.
    """
    said = f'<p role="alert">{escape(trouble)}</p>' if trouble else ""
    if not session.answers:
        return Shown(said, "", "", "", "", "")
    *earlier, answer = session.answers
    kept, pictures = redrawn(session, settings)
    return Shown(said, _answer(answer), kept, pictures, _whole(session), _earlier(earlier))


def redrawn(session: Session, settings: Settings) -> tuple[str, str]:
    """How many tokens some settings keep, and which: what moves with the sliders."""
    answers = session.answers  # read once: another request may show another image meanwhile
    if not answers:
        return "", ""
    answer = answers[-1]
    chosen = session.chosen(answer, settings)
    lines = [f"<strong>{_counts(chosen)}</strong> are kept."]
    if settings.prune_layer != answer.settings.prune_layer:
        lines.append(
            f"Of prune layer {settings.prune_layer} the scores at hand say nothing (they are of "
            f"layer {answer.settings.prune_layer}): ask again to see it."
        )
    if not torch.equal(chosen.keep_mask, answer.record.keep_mask):
        lines.append(
            "Drawn from the scores, the model was not run again: "
            f"the answer saw {answer.record.kept}."
        )
    return _paragraph(" ".join(lines)), _pictures(answer.seen, chosen)


def trouble_of(error: Exception) -> str:
    """What the page says of an error."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return "The image is too large for the memory of the device: choose a smaller one."
    if isinstance(error, Image.DecompressionBombError):
        return "The image is too large: choose a smaller one."
    sentence = sentence_of(error)
    return sentence[:1].upper() + sentence[1:]


def _answer(answer: Answer) -> str:
    settings = answer.settings
    times = f"{_seconds(answer.seconds)}, after a look of {_seconds(answer.seconds_of_look)}"
    return (
        f'<p class="question">{escape(answer.question)}</p>'
        f'<p class="answer">{escape(answer.text) or "(an empty answer)"}</p>'
        + _paragraph(
            f"{_counts(answer.record)} read, in {times} that all questions about the image share. "
            f"Threshold {settings.prune_threshold:g}, cap {settings.max_keep_ratio:g}, "
            f"prune layer {settings.prune_layer}."
        )
    )


def _whole(session: Session) -> str:
    whole, answer = session.whole, session.answers[-1]
    if whole is None:
        return ""
    verdict = "the same answer" if whole.text == answer.text else "another answer"
    return (
        f'<p class="question">With all {answer.record.total} visual tokens, {verdict}:</p>'
        f'<p class="answer">{escape(whole.text) or "(an empty answer)"}</p>'
        + _paragraph(
            f"The stock model took {_seconds(whole.seconds)} from image to answer; look and pruned "
            f"answer took {_seconds(answer.seconds_of_look + answer.seconds)} together."
        )
    )


def _earlier(answers: Sequence[Answer]) -> str:
    if not answers:
        return ""
    rows = [
        f"<li>{escape(answer.question)} <strong>{escape(answer.text)}</strong> "
        f"({_counts(answer.record)}, {_seconds(answer.seconds)})</li>"
        for answer in reversed(answers)
    ]
    return f"<p>Asked before over looks at this image:</p><ul>{''.join(rows)}</ul>"


def _pictures(image: Image.Image, record: GlimpseRecord) -> str:
    scale = LONGEST_SIDE / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size])
    views = [visual for visual in record.visuals if visual.total]
    dimmed = stacked(
        [dim_dropped(image, view.keep_mask, view.grid[1:], view.encoded) for view in views]
    )
    scores = stacked(
        [heat_map(image, view.importance, view.grid[1:], view.encoded) for view in views]
    )
    return (
        '<div class="pictures">'
        + _figure(dimmed, "What is kept; the rest is dimmed")
        + _figure(scores, "The scores, blue low, red high")
        + "</div>"
    )


def _figure(picture: Image.Image, caption: str) -> str:
    file = BytesIO()
    picture.save(file, "JPEG", quality=85)
    address = f"data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}"
    return (
        f'<figure><img src="{address}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    )


def _counts(record: GlimpseRecord) -> str:
    return f"{record.kept} of {record.total} visual tokens ({record.retention:.1%})"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s"


def _paragraph(text: str) -> str:
    return f"<p>{text}</p>"
