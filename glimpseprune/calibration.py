"""Which prune layer a checkpoint can afford, and the threshold that goes with it.

For each candidate P the glimpse is read ahead (`prune_layer=P`) over a set of questions and held
against the late one (P = K): do its best-scored tokens agree? Then each question is answered with
the threshold that keeps the wanted share, and held against the answers of the unpruned model, and
against reference answers and evidence boxes where the data have them. No training is needed.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from .baselines.method import Method, OwnPruning
from .data.visual_cot import visible_evidence
from .evaluation import Answer, batches, by_size, evaluate
from .metrics import exact_match
from .prefill_cost import PrefillLaw
from .questions import Questions, as_asked
from .sample import Sample

SHARES = (0.05, 0.11, 0.30)
DEFAULT_CANDIDATES = 8


@dataclass(frozen=True)
class LayerFigures:
    """What a prune layer amounts to; shares are means over questions.

    Attributes:
        prune_layer: P.
        late_recall: for each of `SHARES`, the part of the late glimpse's best-scored share of the
            tokens that is also among the best-scored share of this one.
        evidence_recall: part of the evidence tokens that the threshold keeps, or None without
            boxes.
        threshold: `prune_threshold` that keeps the wanted share of these questions' tokens.
        retention: share of the tokens it keeps.
        agreement: share of the answers that equal those of the unpruned model.
        accuracy: share of the answers that equal the reference, or None without references.
        cost: counted operations of the decoder's prefill, predictor included, over the stock ones.
        cost_with_encoder: the same with the vision encoder; None where its operations are not
            known.
    """

    prune_layer: int
    late_recall: tuple[float, ...]
    evidence_recall: float | None
    threshold: float
    retention: float
    agreement: float
    accuracy: float | None
    cost: float
    cost_with_encoder: float | None = None

    @property
    def quality(self) -> float:
        """What a choice goes by: accuracy where it is known, else agreement."""
        return self.agreement if self.accuracy is None else self.accuracy


@dataclass(frozen=True)
class Calibration:
    """Figures of every candidate, the latest layer first.

    Attributes:
        layers: one entry a candidate; the first is the glimpse layer K.
        questions: how many were asked.
        base_accuracy: of the unpruned model, or None without reference answers.
        wanted_retention: the share of the tokens that thresholds were chosen for.
        redundant_patches: grey levels within which neighbours predict patches that are left out in
            front of the encoder, or None.
        encoded: share of the tokens that were encoded.
    """

    layers: list[LayerFigures]
    questions: int
    base_accuracy: float | None
    wanted_retention: float
    redundant_patches: float | None = None
    encoded: float = 1.0

    def choose(self, tolerance: float) -> LayerFigures:
        """The cheapest candidate that gives up no more than `tolerance` of the late one's quality.

        Args:
            tolerance: difference in accuracy, or in agreement where accuracy is not known.
        """
        enough = self.layers[0].quality - tolerance
        return min((each for each in self.layers if each.quality >= enough), key=lambda x: x.cost)

    def as_json(self) -> dict:
        """Everything, as JSON takes it."""
        return {"shares": SHARES, **asdict(self)}


def candidate_layers(glimpse_layer: int, wanted: Sequence[int] | None = None) -> list[int]:
    """Prune layers to try, K first.

    Args:
        glimpse_layer: K.
        wanted: the caller's; default: all layers, or `DEFAULT_CANDIDATES` spread over them.

    Raises:
        ValueError: for a layer outside 0..K.
    """
    if wanted is None:
        step = max(1, math.ceil(glimpse_layer / DEFAULT_CANDIDATES))
        wanted = range(glimpse_layer, -1, -step)
    if outside := [layer for layer in wanted if not 0 <= layer <= glimpse_layer]:
        raise ValueError(f"prune layers must lie in 0..glimpse_layer ({glimpse_layer}): {outside}")
    return sorted({glimpse_layer, *wanted}, reverse=True)


@torch.inference_mode()
def calibrate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    layers: Sequence[int],
    wanted_retention: float,
    batch_size: int = 16,
    max_new_tokens: int = 16,
    redundant_patches: float | bool | None = None,
) -> Calibration:
    """Sweep the prune layer over questions.

    Args:
        samples: questions, each with an image.
        layers: candidates, K first, as `candidate_layers` gives them.
        wanted_retention: share of the visual tokens that the threshold shall keep, in (0, 1].
        redundant_patches: as for `generate`: None is as configured, False encodes everything.

    Raises:
        ValueError: for a tolerance that cannot be; when there is no question, or one without an
            image.
    """
    if not samples:
        raise ValueError("there are no questions to calibrate on")
    if any(sample.image is None for sample in samples):
        raise ValueError("calibration needs an image with every question: it looks at the masks")
    if not 0 < wanted_retention <= 1:
        raise ValueError(f"retention must lie in (0, 1], got {wanted_retention}")
    model.config.validate_field("redundant_patches", redundant_patches)
    tolerance = OwnPruning(redundant_patches=redundant_patches).encode_tolerance(model.config)
    samples = by_size(samples)
    importance, evidence = score_questions(model, processor, samples, layers, batch_size, tolerance)
    thresholds = {
        layer: threshold_for(rows, wanted_retention) for layer, rows in importance.items()
    }
    methods = [Method(), *(_pruning_at(layer, thresholds[layer], tolerance) for layer in layers)]
    evaluation = evaluate(model, processor, samples, methods, batch_size, max_new_tokens, _score)
    base, *answers = evaluation.answers
    law, late = PrefillLaw.of(model.config), importance[layers[0]]
    figures = [
        LayerFigures(
            prune_layer=layer,
            late_recall=_late_recall(importance[layer], late),
            evidence_recall=evidence_recall(importance[layer], thresholds[layer], evidence),
            threshold=thresholds[layer],
            retention=_mean([answer.kept for answer in given]),
            agreement=_agreement(given, base),
            accuracy=_accuracy(given),
            cost=_mean([law.share(layer, *_tokens(each)) for each in given]),
            cost_with_encoder=law.encoder
            and _mean([law.share_with_encoder(layer, *_tokens(each)) for each in given]),
        )
        for layer, given in zip(layers, answers, strict=True)
    ]
    encoded = _mean([each.encoded / each.visual for each in answers[0]])
    return Calibration(figures, len(samples), _accuracy(base), wanted_retention, tolerance, encoded)


def threshold_for(importance: Sequence[torch.Tensor], retention: float) -> float:
    """The threshold at which prompts keep a wanted share of their tokens on average.

    Args:
        importance: `(n,)` logits of each prompt's visual tokens.
        retention: the share, averaged over prompts; never exceeded.

    Returns:
        A probability, as `prune_threshold` is: a token is kept if it exceeds it.
    """
    logits = torch.cat(list(importance)).double()
    weights = torch.cat([row.new_full((len(row),), 1 / len(row)) for row in importance]).double()
    logits, order = logits.sort(descending=True)
    shares = weights[order].cumsum(0) / len(importance)
    within = int((shares <= retention + 1e-9).sum())
    return 0.0 if within == len(logits) else float(logits[within].float().sigmoid())


def top_overlap(importance: torch.Tensor, reference: torch.Tensor, share: float) -> float:
    """Part of the reference's best-scored share that is among the best-scored share, too.

    Args:
        importance, reference: `(n,)` logits of the same tokens, -inf at those not encoded.
        share: of the tokens, at least one and no more than were encoded.
    """
    encoded = int((reference > -math.inf).sum())
    count = min(max(1, int(share * len(reference))), encoded)
    best, wanted = (set(each.topk(count).indices.tolist()) for each in (importance, reference))
    return len(best & wanted) / count


def score_questions(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    layers: Sequence[int],
    batch_size: int,
    tolerance: float | None = None,
) -> tuple[dict[int, list[torch.Tensor]], list[torch.Tensor]]:
    """Importance of each question's tokens by prune layer, and which of them show evidence.

    Args:
        tolerance: of `redundant_patches`; None encodes everything.

    Returns:
        For each layer one `(n,)` tensor of logits a question, and one `(n,)` bool tensor a
        question, in the order of `by_size`.
    """
    importance: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    evidence: list[torch.Tensor] = []
    for batch in tqdm(list(batches(samples, batch_size)), leave=False, unit="batch"):
        questions = Questions(model, processor, batch)
        for layer in layers:
            prepared = questions.ready(layer, tolerance)
            record = model.glimpse(**prepared.inputs, prune_layer=layer)
            importance[layer] += record.importance.float().cpu().split(prepared.visual_counts)
        grids: list[list[tuple[int, int]]] = [[] for _ in batch]
        for visual in record.visuals:
            grids[visual.row].append(visual.grid[1:])
        evidence += [
            visible_evidence(processor, sample.boxes, *sample.size, of_row)
            for sample, of_row in zip(batch, grids, strict=True)
        ]
    return importance, evidence


def _pruning_at(layer: int, threshold: float, tolerance: float | None) -> OwnPruning:
    return OwnPruning(
        f"P = {layer}",
        prune_threshold=threshold,
        prune_layer=layer,
        redundant_patches=as_asked(tolerance),
    )


def _tokens(answer: Answer) -> tuple[int, int, int, int]:
    """Text, visual, kept and encoded tokens of an answer's prompt."""
    return answer.prompt, answer.visual, answer.by_layer[-1], answer.encoded


def _score(answer: str, reference: str | None) -> float:
    """Exact match; nothing where there is no reference."""
    return exact_match(answer, reference) if reference else math.nan


def _accuracy(answers: Sequence[Answer]) -> float | None:
    """Over the questions that have a reference answer; None where none has."""
    scores = [answer.score for answer in answers if not math.isnan(answer.score)]
    return _mean(scores) if scores else None


def _agreement(answers: Sequence[Answer], others: Sequence[Answer]) -> float:
    pairs = zip(answers, others, strict=True)
    return _mean([exact_match(answer.text, other.text) for answer, other in pairs])


def _late_recall(
    importance: Sequence[torch.Tensor], late: Sequence[torch.Tensor]
) -> tuple[float, ...]:
    pairs = list(zip(importance, late, strict=True))
    return tuple(
        _mean([top_overlap(early, reference, share) for early, reference in pairs])
        for share in SHARES
    )


def evidence_recall(
    importance: Sequence[torch.Tensor], threshold: float, evidence: Sequence[torch.Tensor]
) -> float | None:
    """Part of a question's evidence that exceeds a threshold, on average; None without any."""
    recalls = [
        (logits.sigmoid()[shown] > threshold).float().mean().item()
        for logits, shown in zip(importance, evidence, strict=True)
        if shown.any()
    ]
    return _mean(recalls) if recalls else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
