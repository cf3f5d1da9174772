"""Questions that are put to a stock model and to ours, and what makes two answers the same.

A question is a function of a model. `compare` puts it to both: where the stock model raises, ours
raises the same kind of error; where it answers, ours answers the same, or refuses with a sentence
that stands in `REFUSALS`. Ours is asked in two modes: with `prune=False`, which is the stock model
bit for bit, and with a mask that keeps every visual token, which is it up to rounding.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from conftest import FAMILIES, Batch, Models, build_batch, randomise
from transformers import Cache, PreTrainedModel

UNPRUNED, KEPT = "unpruned", "kept"
MODES = (UNPRUNED, KEPT)

# With everything kept layers run in two halves, and masks may come in another form than the stock
# ones: sums of float32 are taken in another order. Their error is a few steps of float32 (1.2e-7 of
# the largest summand) a layer; wrong tokens, masks or positions change answers by 0.1 and more.
TOLERANCE = 1e-5

# What is documented as refused while pruning (docs/generation.md, docs/use.md), where the stock
# model answers: the sentence that says so.
REFUSALS = {
    "static cache": "cache cannot be pruned: use the default DynamicCache, or prune=False",
    "made static cache": "visual tokens cannot be pruned from a cache of StaticLayers",
    "4-D mask": "pruning takes a 2-D attention mask",
    "right padding": "pad on the left",
    "short mask": "attention_mask has 3 columns for",
    "chunks": "prefill_chunk_size cannot be combined with pruning",
    "labels on every token": r"labels begin at the first token of row\(s\)",
    "packed rows": "position_ids start again within a row",
    "foreign encodings": "does not say where visual tokens lie",
    "no boundary": "in training a model must be told where the answer begins",
}


class Pair(NamedTuple):
    """A stock model and ours, what they are given, and what ours is told beside.

    Args:
        stock, pruned: models with the same weights.
        inputs: of a batch that is padded on the left.
        settings: what tells our model not to prune, or to keep everything.
    """

    stock: PreTrainedModel
    pruned: PreTrainedModel
    inputs: dict
    settings: dict

    @property
    def is_exact(self) -> bool:
        return "prune" in self.settings

    @property
    def real(self) -> torch.Tensor:
        """`(batch, length)` bool, False at padding, whose states nobody reads."""
        return self.inputs["attention_mask"].bool()

    @property
    def parts(self) -> dict[str, "Pair"]:
        """The whole models, and their backbones."""
        return {
            "model": self,
            "backbone": self._replace(stock=self.stock.model, pruned=self.pruned.model),
        }


def pair_of(models: Models, mode: str, batch: Batch) -> Pair:
    everything = torch.ones(batch.num_visual, dtype=torch.bool)
    settings = {UNPRUNED: {"prune": False}, KEPT: {"visual_keep_mask": everything}}
    return Pair(*models, batch.inputs, settings[mode])


def batch_of(family: str, rows: int = 2, several: bool = True) -> Batch:
    """Left-padded prompts.

    Args:
        several: whether a prompt has several images, or an image and a video where the family sees
            videos.
    """
    sees_videos = hasattr(FAMILIES[family].stock_class, "get_video_features")
    more = [2, (2, 2, 2) if sees_videos else (2, 2)] if several else []
    return build_batch([[4, (3, 3), *more, 3], [2, (2, 3), 3]][:rows], family=family)


def build_pair(family: str, seed: int = 5, change: Callable[[dict], None] | None = None) -> Models:
    """As `conftest.build_models`, for configurations that its sizes cannot say.

    Args:
        change: changes the fields of the stock configuration in place.
    """
    classes = FAMILIES[family]
    fields = classes.config_fields()
    if change is not None:
        change(fields)
    stock = classes.stock_class(classes.stock_config_class(**copy.deepcopy(fields))).eval()
    randomise(stock, seed)
    small = {"predictor_hidden_size": 16, "predictor_condition_size": 16, "predictor_num_heads": 2}
    pruned = classes.family.model_class(classes.family.config_class(**fields, **small)).eval()
    missing, unexpected = pruned.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("model.glimpse.") for name in missing)
    return Models(stock, pruned)


def compare(
    question: Callable,
    pair: Pair,
    refusal: str | None = None,
    raises: type[Exception] | tuple[type[Exception], ...] = (),
    better: type[Exception] | tuple[type[Exception], ...] = (),
) -> None:
    """Put a question to both models.

    Args:
        question: takes a model and the arguments that it is told beside.
        refusal: of `REFUSALS`, where ours refuses with everything kept.
        raises: what the stock model may raise; then ours raises, without pruning the same type.
        better: what the stock model may raise where ours answers.
    """
    try:
        expected = question(pair.stock, {})
    except raises as error:
        with pytest.raises(type(error) if pair.is_exact else Exception):
            question(pair.pruned, pair.settings)
        return
    except better:
        question(pair.pruned, pair.settings)
        return
    if refusal is not None and not pair.is_exact:
        with pytest.raises(ValueError, match=REFUSALS[refusal]):
            question(pair.pruned, pair.settings)
        return
    assert_same(question(pair.pruned, pair.settings), expected, pair)


def assert_same(found, expected, pair: Pair, where: str = "answer") -> None:
    """Compare nested outputs: their fields, the lengths of their tuples, shapes, types, numbers."""
    assert isinstance(found, type(expected)), (where, type(found), type(expected))
    if isinstance(expected, torch.Tensor):
        _assert_same_tensor(found, expected, pair, where)
    elif isinstance(expected, dict):
        names = [name for name in found if name != "glimpse_views"]
        assert names == list(expected), (where, names, list(expected))
        for name in expected:
            assert_same(found[name], expected[name], pair, f"{where}.{name}")
    elif isinstance(expected, (tuple, list)):
        assert len(found) == len(expected), (where, len(found), len(expected))
        for i, (each, wanted) in enumerate(zip(found, expected, strict=True)):
            assert_same(each, wanted, pair, f"{where}[{i}]")
    elif isinstance(expected, Cache):
        assert found.get_seq_length() == expected.get_seq_length(), where
    else:
        assert found == expected, (where, found, expected)


def _assert_same_tensor(
    found: torch.Tensor, expected: torch.Tensor, pair: Pair, where: str
) -> None:
    assert found.shape == expected.shape, (where, found.shape, expected.shape)
    assert found.dtype == expected.dtype, (where, found.dtype, expected.dtype)
    assert found.requires_grad == expected.requires_grad, where
    if pair.is_exact:
        torch.testing.assert_close(
            found, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{where}: {text}"
        )
        return
    found, expected = (_without_padding(each.detach(), pair.real) for each in (found, expected))
    sizes = expected.double().abs().nan_to_num(0.0).flatten()
    tolerance = TOLERANCE * max([1.0, *sizes.tolist()]) if found.is_floating_point() else 0
    torch.testing.assert_close(
        found, expected, rtol=0, atol=tolerance, equal_nan=True, msg=lambda text: f"{where}: {text}"
    )


def _without_padding(values: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """What counts of states `(batch, length, ...)` or attentions `(batch, heads, length, keys)`.

    The batch may have been repeated row by row, and tokens may stand behind it.
    """
    if values.ndim == 4:
        values = values.transpose(1, 2)
    if values.ndim < 3 or len(values) % len(real) or values.shape[1] < real.shape[1]:
        return values
    real = real.repeat_interleave(len(values) // len(real), dim=0)
    behind = values.shape[1] - real.shape[1]
    return values[torch.nn.functional.pad(real, (0, behind), value=True)]
