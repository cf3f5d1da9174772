"""Where and how a model runs: attention, precision, devices, threads, faults half way.

Every test names the feature it shows; `docs/generation.md` has a row for each (`test_docs.py`).
"""

import copy
import threading

import pytest
import torch
from accelerate.utils import send_to_device
from conftest import build_config_fields
from generation_checks import (
    assert_equals_reference,
    assert_near,
    assert_same_output,
    generate,
    gradients_of,
    training_inputs,
)
from generation_prompts import (
    ONE,
    QWEN_ONLY,
    RAGGED,
    family,  # noqa: F401 (a fixture)
    random_keep,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from glimpseprune.families import QWEN2_5_VL
from modeling_glimpseprune import compaction
from modeling_glimpseprune.prune_request import PruneRequest
from modeling_glimpseprune.stock import cache_of, given_cache
from modeling_glimpseprune.visual_tokens import VisualTokens

# Attention implementations.


@QWEN_ONLY
@pytest.mark.feature("flex_attention")
def test_flex_attention_is_refused_as_in_the_stock_model(shared_models):
    for model in shared_models(24):
        model = copy.deepcopy(model)
        with pytest.raises(ValueError, match="flex|Flex"):
            model.set_attn_implementation("flex_attention")


@pytest.mark.slow
@pytest.mark.feature("flex_attention")
@pytest.mark.parametrize("family", ["llava", "llava_next"], indirect=True)
@torch.no_grad()
def test_flex_attention_equals_hidden(build_models, build_batch):
    models, batch = build_models(24), build_batch(RAGGED)
    keep = random_keep(batch)
    for model in models:
        model.set_attn_implementation({"text_config": "flex_attention"})
    try:
        generate(models.stock, batch.inputs, 3)
    except Exception as error:  # whatever the compiler raises
        pytest.skip(f"the stock model does not run it here: {type(error).__name__}")
    output = generate(models.pruned, batch.inputs, 3, visual_keep_mask=keep)
    for model in models:
        model.set_attn_implementation({"text_config": "sdpa"})
    assert_equals_reference(models, batch, output, batch.split(keep))


# Weights and devices.


@pytest.mark.feature("float16, bfloat16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_near(build_models, build_batch, dtype):
    """The scores and the answer's first logits, within the rounding of the stock model's own."""
    models, batch = build_models(26), build_batch(RAGGED)
    keep = random_keep(batch)
    importance = models.pruned.glimpse(**batch.inputs).importance
    expected = generate(models.pruned, batch.inputs, 1, visual_keep_mask=keep).logits[0]
    stock = models.stock(**batch.inputs).logits
    error = (models.stock.to(dtype)(**batch.inputs).logits.float() - stock).abs().max()
    model = models.pruned.to(dtype)
    rounded = generate(model, batch.inputs, 1, visual_keep_mask=keep).logits[0].float()
    assert (rounded - expected).abs().max() < 2 * error
    scores = model.glimpse(**batch.inputs).importance
    assert scores.isfinite().all()
    assert torch.corrcoef(torch.stack([scores.float(), importance]))[0, 1] > 0.98
    assert cache_of(generate(model, batch.inputs)).layers[0].keys.dtype == dtype


@pytest.mark.feature("device_map, disk offload")
@torch.no_grad()
def test_layers_on_disk_equal_hidden(build_models, build_batch, tmp_path):
    models, batch = build_models(27, glimpse={"glimpse_layer": 1}), build_batch(RAGGED)
    keep = random_keep(batch)
    models.pruned.save_pretrained(tmp_path / "model")
    placed = dict.fromkeys(
        ["model.glimpse", "model.language_model.embed_tokens", "lm_head",
         "model.language_model.norm", "model.language_model.rotary_emb",
         "model.language_model.layers.0"],
        "cpu",
    )  # fmt: skip
    others = {name for name, _ in models.pruned.model.named_children()}
    others |= {name for name, _ in models.pruned.model.named_parameters(recurse=False)}
    others -= {"language_model", "glimpse"}
    placed |= dict.fromkeys([f"model.{name}" for name in others], "cpu")
    placed |= {f"model.language_model.layers.{index}": "disk" for index in (1, 2)}
    model = type(models.pruned).from_pretrained(
        tmp_path / "model",
        dtype=torch.float32,
        device_map=placed,
        offload_folder=tmp_path / "offload",
    )
    assert next(model.model.language_model.layers[1].parameters()).device.type == "meta"
    output = generate(model, batch.inputs, visual_keep_mask=keep)
    assert_equals_reference(models, batch, output, batch.split(keep))
    importance = models.pruned.glimpse(**batch.inputs).importance
    assert_near(model.glimpse(**batch.inputs).importance, importance, 1e-5)


@pytest.mark.feature("PEFT adapters")
@torch.no_grad()
def test_an_adapter_on_the_language_model(build_models, build_batch):
    """With its adapter the model answers, and glimpses, as with the adapter merged."""
    peft = pytest.importorskip("peft")
    models, batch = build_models(28), build_batch(RAGGED)
    before = models.pruned.glimpse(**batch.inputs).importance
    config = peft.LoraConfig(
        r=2,
        target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|up_proj)",
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    adapted = peft.get_peft_model(models.pruned, config)
    settings = {"max_keep_ratio": 0.4}
    output = generate(adapted, batch.inputs, **settings)
    importance = cache_of(output).glimpse.importance
    assert (importance - before).abs().max() > 1e-2
    merged = generate(adapted.merge_and_unload(), batch.inputs, **settings)
    assert_same_output(output, merged, 1e-4)
    assert_near(cache_of(merged).glimpse.importance, importance)


@pytest.mark.feature("gradient checkpointing")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_gradients_equal_kept_ones(build_models, build_batch, use_reentrant):
    models, batch = build_models(29, glimpse={"glimpse_layer": 1}), build_batch(RAGGED)
    keep = random_keep(batch)
    with torch.no_grad():
        output = generate(models.pruned, batch.inputs, 4, visual_keep_mask=keep)
    model, inputs = models.pruned.train(), training_inputs(batch, output, [4, 2, 3])
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            arguments = {"use_reentrant": use_reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
        loss = model(**inputs, visual_keep_mask=keep).loss
        loss.backward()
        gradients = {name: grad for name, grad in gradients_of(model).items() if grad is not None}
        found.append((loss.detach(), {name: grad.clone() for name, grad in gradients.items()}))
        model.zero_grad()
    assert_near(found[1][0], found[0][0], 1e-6)
    assert found[1][1].keys() == found[0][1].keys()
    for name, expected in found[0][1].items():
        assert_near(found[1][1][name], expected, 1e-4 * float(expected.abs().max()) + 1e-7)


@pytest.mark.feature("gradient checkpointing")
def test_checkpointed_stage_1_gradients_equal_kept_ones(build_models, build_batch):
    """The forward of stage 1, whose glimpse weights alone learn."""
    models, batch = build_models(29), build_batch(RAGGED)
    with torch.no_grad():
        output = generate(models.stock, batch.inputs, 4)
    model, inputs = models.pruned.train(), training_inputs(batch, output, [4, 2, 3])
    model.requires_grad_(False)
    model.model.glimpse.requires_grad_(True)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            arguments = {"use_reentrant": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
        outputs = model(**inputs, in_place=True, use_cache=True)
        scores = cache_of(outputs).glimpse.importance
        (outputs.loss + scores.sigmoid().sum()).backward()
        glimpse = model.model.glimpse
        found.append([weight.grad.clone() for weight in glimpse.parameters()])
        model.zero_grad()
    for kept, checkpointed in zip(*found, strict=True):
        assert_near(checkpointed, kept, 1e-4 * float(kept.abs().max()) + 1e-7)


@pytest.mark.feature("save_pretrained and reload")
@torch.no_grad()
def test_a_reloaded_model_is_the_same(shared_models, build_batch, tmp_path):
    model, batch = shared_models(24).pruned, build_batch(RAGGED)
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    settings = {"max_keep_ratio": 0.4}
    expected = generate(model, batch.inputs, **settings)
    assert_same_output(generate(reloaded, batch.inputs, **settings), expected)


# Nothing is left behind.


@pytest.mark.feature("threads")
@torch.no_grad()
def test_eight_threads_share_a_model(shared_models, build_batch):
    model = shared_models(24).pruned
    batches = [build_batch(RAGGED if seed % 2 else ONE, seed) for seed in range(8)]
    settings = [
        {"max_keep_ratio": 0.1 + 0.1 * seed, "num_beams": 1 + seed % 3} for seed in range(8)
    ]
    expected = [
        generate(model, batch.inputs, **options)
        for batch, options in zip(batches, settings, strict=True)
    ]
    outputs, start = [None] * 8, threading.Barrier(8)

    def run(index: int) -> None:
        start.wait(timeout=60)
        with torch.no_grad():
            outputs[index] = generate(model, batches[index].inputs, **settings[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for output, alone in zip(outputs, expected, strict=True):
        assert output is not None
        assert_same_output(output, alone)


class Interruption(Exception):
    """Raised half way."""


@pytest.mark.feature("errors half way")
@pytest.mark.parametrize("place", ["vision encoder", "prefill", "decoding"])
@torch.no_grad()
def test_an_error_half_way_leaves_the_model_usable(shared_models, build_batch, place):
    model, batch = shared_models(24).pruned, build_batch(RAGGED)
    settings = {"max_keep_ratio": 0.4}
    expected = generate(model, batch.inputs, **settings)
    hooks_before = [len(module._forward_hooks) for module in model.model.tapped_modules()]

    def fail(*args):
        raise Interruption

    hooks, processors = [], []
    if place == "vision encoder":
        hooks.append(model.model.tapped_modules()[0].register_forward_hook(fail))
    elif place == "prefill":
        hooks.append(model.model.language_model.layers[-1].mlp.register_forward_hook(fail))
    else:

        def fail_later(ids, scores):
            if ids.shape[1] > batch.inputs["input_ids"].shape[1] + 2:
                raise Interruption
            return scores

        processors.append(fail_later)
    with pytest.raises(Interruption):
        generate(model, batch.inputs, logits_processor=processors, **settings)
    for hook in hooks:
        hook.remove()
    hooks_after = [len(module._forward_hooks) for module in model.model.tapped_modules()]
    assert hooks_after == hooks_before
    assert_same_output(generate(model, batch.inputs, **settings), expected)


# Without a GPU: attention interfaces, offloading and devices stood in for.


def flash_attention_in_words(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs
):
    """What `flash_attention_2` computes: causal from the last key backwards, keys masked in 2-D."""
    assert attention_mask is None or attention_mask.shape == (len(key), key.shape[2])
    assert kwargs.get("position_ids") is None or query.shape[2] == 1
    queries, keys = query.shape[2], key.shape[2]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None]
    if attention_mask is not None:
        seen = seen & attention_mask[:, None].bool()
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen[:, None], -1e9)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


@pytest.mark.feature("flash_attention_2")
@torch.no_grad()
def test_nothing_but_a_flash_interface_is_asked_of_it(build_models, build_batch, monkeypatch):
    models, batch = build_models(31, glimpse={"glimpse_layer": 1}), build_batch(RAGGED)
    keep = random_keep(batch)
    expected = models.pruned.glimpse(**batch.inputs).importance
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return flash_attention_in_words(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", counted)
    models.pruned.model.language_model.config._attn_implementation = "flash_attention_2"
    output = generate(models.pruned, batch.inputs, 4, visual_keep_mask=keep)
    assert len(calls) == 4 * 3
    assert_equals_reference(models, batch, output, batch.split(keep))
    importance = models.pruned.glimpse(**batch.inputs).importance
    assert_near(importance, expected)


class NoStream:
    """Stands in for a device's stream where there is no device."""

    def wait_stream(self, other):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


@pytest.mark.feature("offloaded cache")
@torch.no_grad()
def test_an_offloaded_cache_is_pruned(shared_models, build_batch, monkeypatch):
    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda *args: NoStream())
    models, batch = shared_models(24), build_batch(RAGGED)
    keep = random_keep(batch)
    options = {"cache_implementation": "offloaded", "visual_keep_mask": keep}
    output = generate(models.pruned, batch.inputs, **options)
    assert cache_of(output).offloading
    assert_equals_reference(models, batch, output, batch.split(keep))


def place(module: torch.nn.Module, device: str) -> None:
    """Put a module on a device that does not exist, and move what it is called with there."""
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            part._parameters[name] = torch.nn.Parameter(weight.to(device))
        for name, buffer in list(part.named_buffers(recurse=False)):
            part._buffers[name] = buffer.to(device)

    def move(module, args, kwargs):
        return send_to_device(args, device), send_to_device(kwargs, device)

    module.register_forward_pre_hook(move, with_kwargs=True)


@pytest.mark.feature("device_map, several devices")
@pytest.mark.parametrize("glimpse_device", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("glimpse_layer, prune_layer", [(0, 0), (1, 1), (2, 2), (1, 0), (2, 1)])
@torch.no_grad()
def test_no_operation_mixes_devices(monkeypatch, glimpse_layer, prune_layer, glimpse_device):
    """Two devices of tensors without contents: an operation on both would raise.

    A look-ahead asks a batch how long its rows' texts are, which only contents tell; so it is one
    row there.
    """
    early = prune_layer < glimpse_layer
    kept = [11] if early else [9, 11]
    batch, count = len(kept), 10 * len(kept)
    monkeypatch.setattr(compaction, "kept_counts", lambda *args: (kept, False, 15))
    fields = build_config_fields() | {"predictor_hidden_size": 16, "predictor_condition_size": 16}
    fields["attn_implementation"] = "eager"  # other masks look into the padding
    config = QWEN2_5_VL.config_class(
        **fields,
        predictor_num_heads=2,
        glimpse_layer=glimpse_layer,
        glimpse_lora_rank=2 * early,
        stale_rank=2 * early,
        attention_layers=sorted({0, glimpse_layer}),
    )
    with FakeTensorMode():
        model = QWEN2_5_VL.model_class(config).eval().model
        decoder = model.language_model
        devices = ["cuda:0", "cuda:1", "cuda:1"]
        for layer, device in zip(decoder.layers, devices, strict=True):
            place(layer, device)
        place(decoder.norm, "cuda:1")
        place(decoder.rotary_emb, "cuda:0")
        place(model.glimpse, glimpse_device)
        zeros = torch.zeros(count, 6, dtype=torch.long, device="cuda:0")
        features = [torch.empty(count, 16, device="cuda:1") for _ in config.vision_layers]
        tokens = VisualTokens(
            zeros[:, 0], zeros[:, 1], features, zeros, ["image"] * batch, [10] * batch,
            zeros[:batch, 0], zeros[:batch, :3],
        )  # fmt: skip
        request = PruneRequest(
            model.glimpse, tokens, glimpse_layer, None, ["top_left"], 0.5, 0.3, 1, prune_layer
        )
        cache = DynamicCache()
        for length, prune_request in ((16, request), (1, None)):
            past = cache.get_seq_length()
            output = decoder(
                inputs_embeds=torch.empty(batch, length, 32, device="cuda:0"),
                attention_mask=torch.ones(batch, past + length, dtype=torch.long, device="cuda:0"),
                position_ids=torch.zeros(3, batch, length, dtype=torch.long, device="cuda:0"),
                **given_cache(cache),
                use_cache=True,
                prune_request=prune_request,
            )
            assert output.last_hidden_state.shape == (batch, length, 32)
    assert [str(layer.keys.device) for layer in cache.layers] == devices
    assert all(layer.keys.shape[2] == 12 for layer in cache.layers)
