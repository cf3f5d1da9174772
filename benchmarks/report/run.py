"""Runs methods over questions and keeps what they answered."""

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from glimpseprune.baselines.method import Method
from glimpseprune.evaluation import Metric, batches, evaluate
from glimpseprune.sample import Sample

from .records import Record, append_records, read_records


def run_methods(
    model,
    processor,
    samples: Sequence[Sample],
    methods: Sequence[Method],
    path: Path,
    batch_size: int,
    max_new_tokens: int,
    metric: Metric,
) -> None:
    """Answer what the file does not hold yet, and add it there batch by batch.

    Several methods share what a look held of a question's whole prompt.
    """
    settings = {(method.name, method.ratio, method.seed) for method in methods}
    held: dict[int, set] = {}
    for record in read_records(path):
        held.setdefault(record.number, set()).add(record.setting)
    left = [sample for sample in samples if not settings <= held.get(sample.number, set())]
    for batch in tqdm(list(batches(left, batch_size)), unit="batch"):
        shape = (batch_size, max_new_tokens, metric)
        several = len(methods) > 1
        evaluation = evaluate(model, processor, batch, methods, *shape, hold_prompts=several)
        append_records(
            path,
            (
                Record.of(method, answer)
                for method, answers in zip(methods, evaluation.answers, strict=True)
                for answer in answers
            ),
        )
