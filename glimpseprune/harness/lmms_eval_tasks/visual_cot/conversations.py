"""Visual-CoT's conversations as one question each, and the judge's score of an answer."""

import os
from functools import cache
from pathlib import Path

from PIL import Image

from glimpseprune.data.visual_cot import conversation_fields
from glimpseprune.images import open_image
from glimpseprune.judge import Judge, JudgeConfig

KEY = "OPENAI_API_KEY"


def doc_to_visual(doc: dict, lmms_eval_specific_kwargs: dict) -> list[Image.Image]:
    """The image; ValueError names the file when it is missing."""
    folder = lmms_eval_specific_kwargs["image_folder"]
    return [open_image(Path(folder, conversation_fields(doc)[2]))]


def doc_to_text(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """The question without the request for a box."""
    return conversation_fields(doc)[0]


def doc_to_target(doc: dict) -> str:
    """The reference answer."""
    return conversation_fields(doc)[1]


def doc_to_messages(doc: dict, lmms_eval_specific_kwargs: dict) -> list[dict]:
    """One user turn: the image, then the question."""
    image = doc_to_visual(doc, lmms_eval_specific_kwargs)[0]
    content = [{"type": "image", "url": image}, {"type": "text", "text": doc_to_text(doc)}]
    return [{"role": "user", "content": content}]


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """The judge's score; an unreadable verdict counts as 0 and is counted."""
    question, reference, _, _ = conversation_fields(doc)
    score = judge().score(question, reference, results[0])
    return {"judge": score or 0.0, "judge_unread": float(score is None)}


@cache
def judge() -> Judge:
    """The judge that the environment names.

    Raises:
        ValueError: when it names none.
    """
    names = ("GLIMPSEPRUNE_JUDGE_URL", "GLIMPSEPRUNE_JUDGE_MODEL")
    url, model = (os.environ.get(name) for name in names)
    if not url or not model:
        raise ValueError(f"a judge is needed: set {' and '.join(names)}")
    return Judge(JudgeConfig(url, model, api_key_env=KEY if KEY in os.environ else None))
