"""What a report says of each method, from its records."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from glimpseprune.baselines.catalogue import label
from glimpseprune.baselines.method import Method

from .costs import PrefillCosts
from .records import Record
from .statistics import Bootstrap, Estimate


@dataclass(frozen=True)
class Line:
    """One line of the main table: a method at a ratio, averaged over its seeds.

    Attributes:
        accuracy: mean score.
        gain: score less that of all tokens, question by question.
        kept: share of visual tokens that the last layer and the answer work on.
        over_layers: share that a layer works on, averaged over layers.
        tokens_a_layer: visual tokens that a layer works on, averaged over layers.
        flops: counted operations of the prefill, as a share of that with all tokens.
        with_encoder: the same with the vision encoder; None where its operations are not known.
        seeds: draws averaged over.
        scores: of each question, averaged over seeds, in the order of the questions.
    """

    name: str
    ratio: float | None
    accuracy: Estimate
    gain: Estimate
    kept: float
    over_layers: float
    tokens_a_layer: float
    flops: float
    with_encoder: float | None
    seeds: int
    scores: tuple[float, ...]

    def to_dict(self) -> dict[str, object]:
        fields = asdict(self)
        del fields["scores"]
        return fields


class Figures:
    """Everything a page shows.

    Args:
        records: of all methods over the same questions.
        methods: in the order of the page.
        costs: counts operations.
        of_others: the same for methods, by name, that another model answered with.
    """

    def __init__(
        self,
        records: Sequence[Record],
        methods: Sequence[Method],
        costs: PrefillCosts,
        of_others: Mapping[str, PrefillCosts] | None = None,
    ):
        self.costs, self.of_others = costs, of_others or {}
        by_setting: dict[tuple, dict[int, Record]] = {}
        for record in records:
            by_setting.setdefault(record.setting, {})[record.number] = record
        self.numbers = sorted(next(iter(by_setting.values())))
        self.by_method: dict[str, list[tuple[Method, list[Record]]]] = {}
        for method in methods:
            answers = by_setting[method.name, method.ratio, method.seed]
            of_method = [answers[number] for number in self.numbers]
            self.by_method.setdefault(label(method), []).append((method, of_method))
        self.stock = self.by_method[label(Method())][0][1]
        self.bootstrap = Bootstrap([record.page for record in self.stock])
        self.stock_flops = self._flops(Method(), self.stock)
        self.stock_encoder = self._encoder_flops(self.stock)
        self.lines = {name: self._line(runs) for name, runs in self.by_method.items()}

    def records_of(self, name: str) -> list[Record]:
        """A line's records of its first seed, in the order of the questions."""
        return self.by_method[name][0][1]

    def accuracy_where(self, name: str, chosen: Sequence[bool]) -> tuple[float, int]:
        """Mean score of a line over some questions, and their number."""
        scores = np.asarray(self.lines[name].scores)[np.asarray(chosen)]
        return float(scores.mean()) if len(scores) else float("nan"), len(scores)

    def _line(self, runs: list[tuple[Method, list[Record]]]) -> Line:
        method = runs[0][0]
        records = [record for _, of_seed in runs for record in of_seed]
        scores = np.mean([[record.score for record in of_seed] for _, of_seed in runs], axis=0)
        stock = np.asarray([record.score for record in self.stock])
        shares = [sum(record.by_layer) / len(record.by_layer) for record in records]
        flops = np.mean([self._flops(*run) for run in runs])
        return Line(
            method.name,
            method.ratio,
            self.bootstrap.estimate(scores),
            self.bootstrap.estimate(scores - stock),
            float(np.mean([record.by_layer[-1] / record.visual for record in records])),
            float(np.mean([s / r.visual for s, r in zip(shares, records, strict=True)])),
            float(np.mean(shares)),
            float(flops / self.stock_flops),
            self._with_encoder(flops, records),
            len(runs),
            tuple(scores.tolist()),
        )

    def _flops(self, method: Method, records: Sequence[Record]) -> float:
        costs = self.of_others.get(method.name, self.costs)
        return float(np.mean([costs.flops(method, record) for record in records]))

    def _encoder_flops(self, records: Sequence[Record]) -> float | None:
        counted = [self.costs.encoder_flops(record) for record in records]
        return None if None in counted else float(np.mean(counted))

    def _with_encoder(self, flops: float, records: Sequence[Record]) -> float | None:
        encoder = self._encoder_flops(records)
        if encoder is None:
            return None
        return float((flops + encoder) / (self.stock_flops + self.stock_encoder))
