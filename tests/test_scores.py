"""Scores that overflow, or are no numbers: pruning never goes by them in silence."""

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES

from modeling_glimpseprune.decoder_layers import query_logits, scaled_products

PROMPTS = [[3, (2, 3), 2], [(2, 2), 4]]
FLOAT16_LIMIT = torch.finfo(torch.float16).max


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(build_models):
    """A model of its own, to be damaged."""
    return build_models(60).pruned


def nan_pixels(batch, row: int) -> dict:
    """Inputs of a batch with nan in the pixel values of a row's image."""
    inputs = dict(batch.inputs)
    pixels = inputs["pixel_values"].clone()
    pixels[0 if row == 0 else -1] = torch.nan
    return inputs | {"pixel_values": pixels}


def refused(rows: list[int]):
    return pytest.raises(ValueError, match=rf"row\(s\) {re.escape(str(rows))} are no numbers")


def calls(model, **options) -> list:
    return [
        lambda inputs: model.generate(**inputs, max_new_tokens=1, **options),
        lambda inputs: model(**inputs, **options),
        lambda inputs: model.glimpse(**inputs, **options),
    ]


@pytest.mark.parametrize("row", [0, 1])
@torch.no_grad()
def test_pixels_that_are_no_numbers(shared_models, build_batch, family, row):
    """The row is named; the vision encoder mixes nothing between images."""
    model, batch = shared_models(60).pruned, build_batch(PROMPTS)
    for call in calls(model):
        with refused([row]):
            call(nan_pixels(batch, row))


@pytest.mark.parametrize("setting", [{"prune_layer": 0}, {"max_keep_ratio": 0.5}])
@torch.no_grad()
def test_weights_that_are_no_numbers(model, build_batch, setting):
    batch = build_batch(PROMPTS)
    model.model.glimpse.predictor.output_projection.weight.data[0, 0] = torch.nan
    for call in calls(model, **setting):
        with refused([0, 1]):
            call(batch.inputs)


@torch.no_grad()
def test_who_chooses_otherwise_needs_no_scores(model, build_batch):
    batch = build_batch(PROMPTS)
    model.model.glimpse.predictor.output_projection.weight.data[0, 0] = torch.nan
    keep = torch.arange(batch.num_visual) % 2 == 0
    for options in ({"visual_keep_mask": keep}, {"prune": False}):
        assert model(**batch.inputs, **options).logits.isfinite().all()


@pytest.mark.parametrize(("score", "kept"), [(torch.inf, 2), (-torch.inf, 1)])
@torch.no_grad()
def test_infinite_scores_lie_beyond_every_threshold(model, build_batch, score, kept):
    batch = build_batch([[(2, 2), 3]])
    model.model.glimpse.predictor.output_projection.weight.data.zero_()
    model.model.glimpse.predictor.output_projection.bias.data.fill_(score)
    record = model.glimpse(**batch.inputs, prune_threshold=0.5)
    assert record.kept == (record.total if score > 0 else model.config.min_keep_tokens)
    limited = model.glimpse(**batch.inputs, prune_threshold=1.0, min_keep_tokens=kept)
    assert limited.keep_mask.tolist() == [True] * kept + [False] * (limited.total - kept)
    assert model.generate(**batch.inputs, max_new_tokens=1).shape[0] == 1


@torch.no_grad()
def test_products_beyond_the_range_of_float16():
    """The query is scaled before it meets the keys, as every attention implementation does."""
    layer = SimpleNamespace(self_attn=SimpleNamespace(scaling=64**-0.5))
    query = torch.full((1, 2, 1, 64), 60.0, dtype=torch.float16)
    keys = torch.full((1, 1, 3, 64), 60.0, dtype=torch.float16)
    assert 60 * 60 * 64 > FLOAT16_LIMIT
    assert torch.equal(scaled_products(layer, query, keys).float(), torch.full((1, 2, 3), 28_800.0))


@torch.no_grad()
def test_large_queries_and_keys_in_float16(build_models, build_batch):
    """Products pass float16's range before they are scaled; stock attention stays finite."""
    sizes = {"hidden_size": 128, "num_heads": 2, "num_key_value_heads": 1}
    models = build_models(61, glimpse={"attention_layers": [1], "glimpse_layer": 1}, **sizes)
    batch, largest = build_batch([[3, (3, 4), 4]]), []
    attention = [model.model.language_model.layers[1].self_attn for model in models]

    def measure(layer, *arguments):
        logits = query_logits(layer, *arguments)
        largest.append(float(logits.abs().max()))
        return logits

    model = models.pruned
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeling_glimpseprune.prefill.query_logits", measure)
        model.glimpse(**batch.inputs)
    for part in attention:  # scaled products of 10,000; unscaled ones are eight times as large
        factor = (10_000 / largest[0]) ** 0.5
        for projection in (part.q_proj, part.k_proj):
            projection.weight.data *= factor
            if projection.bias is not None:
                projection.bias.data *= factor
    assert 10_000 / attention[1].scaling > FLOAT16_LIMIT
    expected = model.glimpse(**batch.inputs).importance
    half, stock = model.half(), models.stock.half()
    inputs = batch.inputs | {"pixel_values": batch.inputs["pixel_values"].half()}
    assert stock(**inputs).logits.isfinite().all()
    record = half.glimpse(**inputs)
    # float16 rounds to one part in 2,048, and the predictor's softmax makes much of differences
    # between numbers of thousands
    atol = 0.15 * float(expected.abs().max())
    torch.testing.assert_close(record.importance.float(), expected, rtol=0, atol=atol)
    assert half(**inputs).logits.isfinite().all()
