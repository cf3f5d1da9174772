"""Losses and figures of stage 1: how importance matches evidence, and answers those of the base.

What returns `(num_rows,)` is computed for each row of the batch (each question) by itself, over all
its visual tokens, so that a small image counts as much as a large one; averaging over rows is the
caller's.
"""

import torch
from torch.nn import functional as F

from modeling_glimpseprune.glimpse_record import GlimpseRecord

DICE_SMOOTHING = 1.0


def dice_loss(
    importance: torch.Tensor, evidence: torch.Tensor, rows: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """One minus the soft Dice coefficient of probabilities p and evidence e.

    `1 - (2 * sum(p * e) + s) / (sum(p) + sum(e) + s)` with smoothing s = 1.

    Args:
        importance: `(N,)` logits of the batch's visual tokens.
        evidence: `(N,)` bool, or probabilities to learn from.
        rows: `(N,)` row of each token.
        num_rows: rows in the batch.

    Returns:
        `(num_rows,)` float32, each in [0, 1).
    """
    probability, evidence = importance.float().sigmoid(), evidence.float()
    shared = _sum_by_row(probability * evidence, rows, num_rows)
    total = _sum_by_row(probability + evidence, rows, num_rows)
    return 1 - (2 * shared + DICE_SMOOTHING) / (total + DICE_SMOOTHING)


def bce_loss(
    importance: torch.Tensor, evidence: torch.Tensor, rows: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """Binary cross-entropy, averaged over each row's visual tokens.

    Arguments as for `dice_loss`. A row without visual tokens has a loss of 0.

    Returns:
        `(num_rows,)` float32.
    """
    losses = F.binary_cross_entropy_with_logits(
        importance.float(), evidence.float(), reduction="none"
    )
    return _ratio(
        _sum_by_row(losses, rows, num_rows),
        _sum_by_row(torch.ones_like(losses), rows, num_rows),
    )


def located_losses(
    record: GlimpseRecord, target: torch.Tensor, num_rows: int
) -> dict[str, torch.Tensor]:
    """`dice_loss` and `bce_loss` over what was encoded; patches that were not have no importance.

    Args:
        record: of the batch.
        target: `(N,)` evidence, or probabilities to learn from.
        num_rows: rows in the batch.
    """
    located = (record.importance, target, record.rows)
    if record.encoded is not None:
        located = tuple(each[record.encoded] for each in located)
    return {
        "dice_loss": dice_loss(*located, num_rows),
        "bce_loss": bce_loss(*located, num_rows),
    }


def answer_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the completions, averaged over all their tokens.

    Args:
        logits: `(batch, completion, vocabulary)`, each predicting the label in its place.
        labels: `(batch, completion)`, -100 at padding.

    Returns:
        A float32 scalar.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


def distillation_loss(
    teacher: torch.Tensor, student: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """KL divergence from the teacher's answer distribution to the student's.

    `sum over words of p_teacher * (log p_teacher - log p_student)`, averaged over each row's answer
    tokens. A row without an answer has a loss of 0.

    Args:
        teacher, student: logits `(batch, completion, vocabulary)`, each of the label in its place;
            no gradient goes to the teacher.
        labels: `(batch, completion)`, -100 at padding.

    Returns:
        `(batch,)`, at least float32.
    """
    teacher, student = (
        logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        for logits in (teacher.detach(), student)
    )
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    answered = (labels != -100).to(divergence)
    return _ratio((divergence * answered).sum(1), answered.sum(1))


def retention_loss(
    importance: torch.Tensor, rows: torch.Tensor, num_rows: int, target: float | None
) -> torch.Tensor:
    """What keeping visual tokens costs, by the expected share s of tokens kept.

    Without a target it is s of each row: a price for every token. With one it is
    `(s - target)^2 / target`, where s is the batch's mean, so that questions may differ.

    Args:
        importance: `(N,)` logits.
        rows: `(N,)` row of each token.
        num_rows: rows in the batch.
        target: in (0, 1], or None.

    Returns:
        `(num_rows,)`, at least float32; with a target all alike.
    """
    probability = importance.to(torch.promote_types(importance.dtype, torch.float32)).sigmoid()
    share = _ratio(
        _sum_by_row(probability, rows, num_rows),
        _sum_by_row(torch.ones_like(probability), rows, num_rows),
    )
    if target is None:
        return share
    return ((share.mean() - target).square() / target).expand(num_rows)


def mask_figures(
    keep: torch.Tensor, evidence: torch.Tensor, rows: torch.Tensor, num_rows: int
) -> dict[str, torch.Tensor]:
    """How a keep mask compares with the evidence.

    Args:
        keep: `(N,)` bool.
        evidence, rows, num_rows: as for `dice_loss`.

    Returns:
        `precision` (evidence among kept), `recall` (kept among evidence), `iou` and `retention`
        (kept among all), each `(num_rows,)` float32, 0 where nothing stands below the line.
    """
    both = _sum_by_row((keep & evidence).float(), rows, num_rows)
    either = _sum_by_row((keep | evidence).float(), rows, num_rows)
    kept = _sum_by_row(keep.float(), rows, num_rows)
    wanted = _sum_by_row(evidence.float(), rows, num_rows)
    total = _sum_by_row(torch.ones_like(keep, dtype=torch.float32), rows, num_rows)
    return {
        "precision": _ratio(both, kept),
        "recall": _ratio(both, wanted),
        "iou": _ratio(both, either),
        "retention": _ratio(kept, total),
    }


def _sum_by_row(values: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    return values.new_zeros(num_rows).index_add(0, rows, values)


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    return part / whole.clamp(min=1)
