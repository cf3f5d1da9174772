"""Counted costs of a prefill: operations, waits for the device, sizes of what is allocated."""

import math

import pytest
import torch
from conftest import build_batch, build_models
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.efficiency.measurement import (
    CPU_KERNEL,
    LiveBytes,
    cache_bytes,
    flops_by_stage,
    peak_bytes,
)
from benchmarks.prefill_flops import MODELS
from glimpseprune.prefill_cost import (
    OFFICIAL_PREDICTOR_7B,
    QWEN2_5_VL_7B,
    Additions,
    Decoder,
    Predictor,
    PrefillLaw,
    VisionEncoder,
    pruned_after_layer,
    pruned_prefill,
    stock_prefill,
)
from modeling_glimpseprune import decoder_layers
from modeling_glimpseprune.stock import cache_of

TEXT, GRID = [3, 4], (9, 11)  # text tokens before and after an image of 9 x 11 visual tokens
VISION_TOKENS = 2  # <|vision_start|> and <|vision_end|>
WAITING_METHODS = ("item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__float__")
WAITING_OPERATIONS = (
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.unique_dim.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.repeat_interleave.Tensor,
)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def family(request):
    """Qwen3-VL's heads are wider than their share of the model; features join between layers."""
    return request.param


@pytest.fixture(scope="module")
def models(family):
    glimpse = {"glimpse_layer": 3, "vision_layers": [2, 1]}
    models = build_models(hidden_size=64, num_layers=6, glimpse=glimpse, family=family)
    for model in models:
        model.requires_grad_(False)  # torch's counter follows gradients where there could be any
    return models


@pytest.fixture(scope="module")
def batch(family):
    return build_batch([[TEXT[0], GRID, TEXT[1]]], family=family)


def run(model, batch, **settings):
    with torch.no_grad():
        return model(**batch.inputs, use_cache=True, logits_to_keep=1, **settings)


@torch.no_grad()
def count_flops(function) -> int:
    with FlopCounterMode(display=False, custom_mapping=CPU_KERNEL) as counter:
        function()
    return counter.get_total_flops()


def decoder_flops(model, batch, **settings) -> int:
    """Operations of the text model, and of the glimpse where the model has one."""
    images = (batch.inputs["pixel_values"], batch.inputs["image_grid_thw"])
    total = count_flops(lambda: run(model, batch, **settings))
    head = 2 * model.lm_head.weight.numel()
    return total - count_flops(lambda: model.model.visual(*images)) - head


def geometry(model) -> tuple[Decoder, Predictor]:
    config, text = model.config, model.config.text_config
    decoder = Decoder(
        text.num_hidden_layers,
        text.hidden_size,
        text.intermediate_size,
        text.num_attention_heads,
        text.num_key_value_heads,
        model.model.language_model.layers[0].self_attn.head_dim,
    )
    predictor = Predictor(
        len(config.vision_layers),
        config.predictor_hidden_size,
        config.predictor_condition_size,
        config.vision_config.hidden_size,
        text.num_attention_heads,
    )
    return decoder, predictor


def rotary_flops(model, tokens: int) -> int:
    """Releases that keep a table for each of the three axes multiply matrices for the angles."""
    decoder = model.model.language_model
    table, _ = decoder.rotary_emb(torch.zeros(1), torch.zeros(3, 1, 1, dtype=torch.long))
    return 3 * table.shape[-1] * tokens if table.ndim == 4 else 0


@pytest.mark.parametrize("kept_ratio", [0.05, 0.3, 1.0])
def test_formula_agrees_with_the_counter(models, batch, kept_ratio):
    settings = {"prune_threshold": 0.0, "max_keep_ratio": kept_ratio}
    decoder, predictor = geometry(models.pruned)
    kept = cache_of(run(models.pruned, batch, **settings)).glimpse.kept
    text = sum(TEXT) + VISION_TOKENS
    visual = math.prod(GRID)
    expected = pruned_prefill(decoder, predictor, 3, text, visual, kept)
    assert kept == max(1, int(kept_ratio * visual))
    expected += rotary_flops(models.pruned, text + visual + 1 + text + kept)
    assert decoder_flops(models.pruned, batch, **settings) == expected
    stock = stock_prefill(decoder, text + visual) + rotary_flops(models.stock, text + visual)
    assert decoder_flops(models.stock, batch) == stock


@pytest.mark.parametrize("ranks", [(0, 0), (4, 2)])
@pytest.mark.parametrize("prune_layer", [0, 1, 2, 3])
def test_looking_ahead_costs_what_the_formula_says(family, batch, prune_layer, ranks):
    lora, stale = ranks
    glimpse = {"glimpse_layer": 3, "vision_layers": [2, 1]}
    glimpse |= {"glimpse_lora_rank": lora, "stale_rank": stale}
    sizes = {"hidden_size": 64, "num_layers": 6, "glimpse": glimpse, "family": family}
    model = build_models(**sizes).pruned.requires_grad_(False)
    settings = {"prune_threshold": 0.0, "max_keep_ratio": 0.1, "prune_layer": prune_layer}
    kept = cache_of(run(model, batch, **settings)).glimpse.kept
    text, visual = sum(TEXT) + VISION_TOKENS, math.prod(GRID)
    law = PrefillLaw.of(model.config)
    expected = law.pruned(prune_layer, text, visual, kept)
    expected += rotary_flops(model, text + visual + 1 + text + kept)
    assert decoder_flops(model, batch, **settings) == expected


@pytest.mark.parametrize(
    ("name", "visual", "kept", "shares"),
    [
        ("qwen2_5_vl_7b", 5000, 200, {18: 0.673, 7: 0.307, 6: 0.274, 5: 0.240, 4: 0.208, 0: 0.075}),
        ("qwen2_5_vl_7b", 5000, 550, {18: 0.694, 7: 0.353, 6: 0.322, 5: 0.291, 4: 0.260, 0: 0.136}),
        ("qwen2_5_vl_3b", 5000, 200, {23: 0.674, 8: 0.283, 6: 0.231}),
        ("qwen2_5_vl_3b", 5000, 550, {23: 0.694, 8: 0.327, 6: 0.278}),
        ("llava_1_5_7b", 576, 64, {21: 0.734, 6: 0.462, 4: 0.426}),
    ],
)
def test_shares_are_those_of_another_count(name, visual, kept, shares):
    """Rounded to a thousandth; it counted the text's MLP of layer P once, which runs twice here."""
    decoder, predictor, glimpse_layer = MODELS[name]
    text = 60
    stock = stock_prefill(decoder, text + visual)
    tolerance = 1e-3 + decoder.mlp(text + 1) / stock
    for prune_layer, expected in shares.items():
        counted = pruned_prefill(decoder, predictor, glimpse_layer, text, visual, kept, prune_layer)
        assert counted / stock == pytest.approx(expected, abs=tolerance), prune_layer


def test_an_early_prefill_of_7b_costs_a_quarter_of_stock():
    stock = stock_prefill(QWEN2_5_VL_7B, 5060)
    shape = (QWEN2_5_VL_7B, OFFICIAL_PREDICTOR_7B, 18, 60, 5000, 200)
    for additions in (Additions(), Additions(16, 16)):
        assert pruned_prefill(*shape, 5, additions) <= 0.245 * stock
        assert pruned_prefill(*shape, 4, additions) <= 0.21 * stock


def test_an_early_prefill_of_qwen3_vl_8b():
    """As docs/efficiency.md says, and little more with low-rank additions."""
    decoder, predictor, glimpse_layer = MODELS["qwen3_vl_8b"]
    stock = stock_prefill(decoder, 5060)
    shape = (decoder, predictor, glimpse_layer, 60, 5000, 200)
    for prune_layer, share in ((24, 0.695), (8, 0.290), (5, 0.214)):
        counted = pruned_prefill(*shape, prune_layer)
        assert counted / stock == pytest.approx(share, abs=6e-4)
        assert pruned_prefill(*shape, prune_layer, Additions(16, 16)) <= counted + 0.002 * stock


def test_prefill_of_7b_costs_at_most_0675_of_stock():
    stock = stock_prefill(QWEN2_5_VL_7B, 5060)
    shape = (QWEN2_5_VL_7B, OFFICIAL_PREDICTOR_7B, 18, 60, 5000, 200)
    assert pruned_prefill(*shape) <= 0.675 * stock
    assert pruned_after_layer(*shape) / stock == pytest.approx(0.697, abs=5e-4)


def test_without_pruning_nothing_is_added(models, batch):
    unpruned = decoder_flops(models.pruned, batch, prune=False)
    assert unpruned <= 1.001 * decoder_flops(models.stock, batch)


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_formula_of_the_vision_encoder_agrees_with_the_counter(models):
    batch = build_batch([[3, (6, 8), 4]])  # whole windows
    images = (batch.inputs["pixel_values"], batch.inputs["image_grid_thw"])
    encoder = VisionEncoder.of(models.pruned.config)
    assert count_flops(lambda: models.stock.model.visual(*images)) == encoder.cost(6 * 8)


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_formula_agrees_with_the_counter_where_patches_are_left_out(models):
    """Two of four windows left out whole; the decoder sees what is left."""
    model, batch = models.pruned, build_batch([[3, (4, 4), 4]])
    encode = torch.arange(16) // 2 % 2 == 0  # columns 0 and 1, a window's width
    text, law = 3 + 4 + VISION_TOKENS, PrefillLaw.of(model.config)
    settings = {"visual_encode_mask": encode, "max_keep_ratio": 0.25, "prune_threshold": 0.0}
    head = 2 * model.lm_head.weight.numel()
    counted = count_flops(lambda: run(model, batch, **settings)) - head
    expected = law.encoder.cost(8) + law.pruned(None, text, 16, 4, 8)
    stock = law.encoder.cost(16) + stock_prefill(law.decoder, text + 16)
    assert law.share_with_encoder(None, text, 16, 4, 8) == expected / stock
    assert counted == expected + rotary_flops(model, text + 8 + 1 + text + 4)


def test_stages_add_up(models, batch):
    settings = {"prune_threshold": 0.0, "max_keep_ratio": 0.2}
    stages = flops_by_stage(lambda: run(models.pruned, batch, **settings), prune_layer=3)
    assert sum(stages.values()) == count_flops(lambda: run(models.pruned, batch, **settings))
    assert stages["head"] == 2 * models.pruned.lm_head.weight.numel()
    images = (batch.inputs["pixel_values"], batch.inputs["image_grid_thw"])
    assert stages["vision"] == count_flops(lambda: models.pruned.model.visual(*images))
    decoder, predictor = geometry(models.pruned)
    kept, text = int(0.2 * math.prod(GRID)), sum(TEXT) + VISION_TOKENS
    above = decoder.mlp(text + kept) + 2 * decoder.layer(text + kept)
    assert stages["decoder above P"] == above
    assert stages["predictor"] >= predictor.cost(math.prod(GRID))


def test_live_bytes_follow_what_lives():
    with LiveBytes(torch.nn.Linear(2, 2)) as live:
        first = torch.zeros(1000)
        second = first + 1
        view = second.view(10, 100)
        assert live.now == live.peak == 8000
        del first, second
        assert live.now == 4000 and live.peak == 8000
        view.add_(1)
        del view
        assert live.now == 0
        torch.zeros(3000)
    assert live.peak == 12000


@torch.no_grad()
def test_memory_of_a_prefill(models, family, monkeypatch):
    """A long prefill takes less memory than the stock model's, a short one no more."""
    batch = build_batch([[3, (24, 24), 4]] * 2, family=family)
    settings = {"prune_threshold": 0.0, "max_keep_ratio": 0.04}
    stock = peak_bytes(lambda: run(models.stock, batch), models.stock)
    whole = peak_bytes(lambda: run(models.pruned, batch, **settings), models.pruned)
    if family == "qwen3_vl":  # its tiny MLP is no wider than its heads, which bound the peak
        assert whole <= stock, (whole, stock)
        return
    monkeypatch.setattr(decoder_layers, "MLP_CHUNK", 128)
    parts = peak_bytes(lambda: run(models.pruned, batch, **settings), models.pruned)
    assert parts < whole <= stock, (parts, whole, stock)
    assert parts <= 0.75 * stock


@torch.no_grad()
def test_a_cache_holds_kept_tokens_only(models, batch):
    text_config = models.pruned.config.text_config
    cache = cache_of(run(models.pruned, batch, prune_threshold=0.0, max_keep_ratio=0.2))
    tokens = sum(TEXT) + VISION_TOKENS + int(0.2 * math.prod(GRID))
    size = models.pruned.model.language_model.layers[0].self_attn.head_dim
    heads = text_config.num_key_value_heads
    assert cache_bytes(cache) == 2 * 4 * text_config.num_hidden_layers * tokens * heads * size
    storages = [part.untyped_storage() for layer in cache.layers for part in (layer.keys,)]
    assert 2 * sum(storage.nbytes() for storage in storages) == cache_bytes(cache)


class WaitCounter(TorchDispatchMode):
    """Counts what would make the host wait for a device: values and shapes read from tensors."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.waits = 0
        for name in WAITING_METHODS:
            monkeypatch.setattr(torch.Tensor, name, self._counted(getattr(torch.Tensor, name)))

    def _counted(self, method):
        def counted(*args, **kwargs):
            self.waits += 1
            return method(*args, **kwargs)

        return counted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in WAITING_OPERATIONS and "output_size" not in (kwargs or {}):
            self.waits += 1
        indexing = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
        if function in indexing and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.waits += 1
        return function(*args, **(kwargs or {}))


def count_waits(model, batch, **settings) -> int:
    with pytest.MonkeyPatch.context() as monkeypatch, WaitCounter(monkeypatch) as counter:
        run(model, batch, **settings)
    return counter.waits


def test_one_wait_for_the_device_beyond_stock(models, batch):
    stock = count_waits(models.stock, batch)
    assert stock > 0  # the counter sees the stock model's own
    assert count_waits(models.pruned, batch, prune=False) == stock
    vision = models.stock.config.vision_config
    if models.pruned.model.adds_between_layers:  # stock reads and writes them by a bool index
        stock -= 2 * len(vision.deepstack_visual_indexes)
    assert count_waits(models.pruned, batch, max_keep_ratio=0.2) == stock + 1
    assert count_waits(models.pruned, batch, max_keep_ratio=0.2, prune_layer=1) == stock + 1


def test_a_batch_that_looks_ahead_waits_once_more(models, family):
    """How many visual tokens each of several rows has is known on the device alone."""
    batch = build_batch([[3, (3, 4), 4], [2, (2, 5), 1]], family=family)
    settings = {"prune_threshold": 0.0, "max_keep_ratio": 0.2}  # as ragged in both
    waits = [count_waits(models.pruned, batch, prune_layer=each, **settings) for each in (3, 1)]
    assert waits[1] == waits[0] + 1


class LargestTensor(TorchDispatchMode):
    """The most elements any operation but an attention kernel returns."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if "attention" not in function.__name__:
            tensors = output if isinstance(output, (tuple, list)) else [output]
            sizes = [tensor.numel() for tensor in tensors if isinstance(tensor, torch.Tensor)]
            self.most = max([self.most, *sizes])
        return output


@pytest.mark.parametrize("prune_layer", [3, 1])
def test_nothing_is_quadratic_in_the_visual_tokens(models, family, prune_layer):
    grid = (48, 48)
    batch = build_batch([[3, grid, 4]], family=family)
    with LargestTensor() as largest:
        run(models.pruned, batch, max_keep_ratio=0.1, prune_layer=prune_layer)
    assert largest.most < math.prod(grid) ** 2 / 4
