"""Answers as a file: JSON lines, or Parquet."""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from .questions import Row

FORMATS = (".jsonl", ".parquet")
ROWS_AT_ONCE = 1024


def check_format(output: Path) -> None:
    """Refuse an output that cannot be written, before anything is asked.

    Raises:
        ValueError: when it is of another format, or its library is missing.
    """
    if output.suffix not in FORMATS:
        raise ValueError(f"answers are written to {' or '.join(FORMATS)}, got {output}")
    if output.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise ValueError(f"{output} is Parquet: pip install pyarrow to write it") from None


def write_answers(output: Path, answers: Iterable[dict], masks: bool) -> None:
    """Write answers to a file that is whole or not there.

    Args:
        answers: see `answered` and `failed`.
        masks: whether they have masks and grids.
    """
    unfinished = output.with_name(f"{output.name}.partial")
    write = _write_parquet if output.suffix == ".parquet" else _write_json_lines
    write(unfinished, iter(answers), masks)
    unfinished.replace(output)


def answered(
    row: Row, text: str, mask: Sequence[bool], grids: list, seconds: float, masks: bool
) -> dict:
    """An answer as it is written."""
    kept, total = sum(mask), len(mask)
    answer = {
        "row": row.number,
        "id": row.id,
        "question": row.question,
        "answer": text,
        "kept": kept,
        "total": total,
        "retention": round(kept / total, 6),
        "seconds": seconds,
        "error": None,
    }
    return answer | ({"mask": mask, "grids": grids} if masks else {})


def failed(row: Row, error: str, masks: bool) -> dict:
    """A row that could not be answered, as it is written."""
    none = ("answer", "kept", "total", "retention", "seconds")
    answer = {"row": row.number, "id": row.id, "question": row.question, **dict.fromkeys(none)}
    answer["error"] = error
    return answer | ({"mask": None, "grids": None} if masks else {})


def sentence_of(error: BaseException) -> str:
    """An error in one line, with its type where the words alone may say too little."""
    line = next(iter(str(error).strip().splitlines()), "")
    return (
        line
        if line and isinstance(error, (ValueError, OSError))
        else f"{type(error).__name__}: {line}"
    )


def _write_json_lines(path: Path, answers: Iterator[dict], masks: bool) -> None:
    with open(path, "w", encoding="utf-8") as lines:
        for answer in answers:
            lines.write(json.dumps(answer, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, answers: Iterator[dict], masks: bool) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    fields = {
        "row": pyarrow.int64(),
        "id": pyarrow.string(),
        "question": pyarrow.string(),
        "answer": pyarrow.string(),
        "kept": pyarrow.int32(),
        "total": pyarrow.int32(),
        "retention": pyarrow.float64(),
        "seconds": pyarrow.float64(),
        "error": pyarrow.string(),
    }
    if masks:
        fields["mask"] = pyarrow.list_(pyarrow.bool_())
        fields["grids"] = pyarrow.list_(pyarrow.list_(pyarrow.int32()))
    schema = pyarrow.schema(fields.items())
    with ParquetWriter(path, schema) as writer:
        while rows := list(islice(answers, ROWS_AT_ONCE)):
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
