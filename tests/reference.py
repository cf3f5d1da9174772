"""Slow and obvious references that the fast code is compared with.

They run the *stock* transformers model on one prompt at a time, without padding and without reusing
a cache. Pruning is expressed by forbidding attention: every token stays, and additive masks hide
the dropped ones. Nothing here shares code with the split forward, the cache or the predictor.

A prompt is a dictionary of model inputs as a row of `conftest.Batch` holds it; P is its length, n
the number of its visual tokens, T the length of a completion.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from itertools import product
from typing import NamedTuple

import torch
from llava_prompts import PATCH, SIDE, best_tiles, grid_of

from modeling_glimpseprune.stock import cache_of

PIXEL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "image_sizes",
    "vision_feature_select_strategy",
)


class ReferenceOutput(NamedTuple):
    """What the stock model computes while dropped tokens are hidden.

    Args:
        logits: `(P + T, vocabulary)`.
        keys, values: for each layer `(key_value_heads, P + T, head_size)`, dropped tokens included.
        kept: `(P + T,)` bool, False at dropped tokens.
    """

    logits: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    kept: torch.Tensor


def run_hidden(
    stock, prompt: dict, completion: torch.Tensor, keep_mask: torch.Tensor, glimpse_layer: int
) -> ReferenceOutput:
    """Run a prompt and a completion `(T,)` while tokens outside `keep_mask (n,)` are hidden."""
    input_ids = torch.cat([prompt["input_ids"], completion.view(1, -1)], dim=1)
    prompt_length, length = prompt["input_ids"].shape[1], input_ids.shape[1]
    dropped = torch.zeros(length, dtype=torch.bool)
    dropped[:prompt_length] = dropped_positions(stock, prompt, keep_mask)
    masks = [
        allowed_attention(dropped, prompt_length, prunes=layer > glimpse_layer)
        for layer in range(stock.config.get_text_config().num_hidden_layers)
    ]
    pixels = {name: prompt[name] for name in PIXEL_INPUTS if name in prompt}
    with attention_restricted_to(stock, masks):
        outputs = stock(
            input_ids=input_ids,
            position_ids=positions(stock, prompt, length),
            use_cache=True,
            **pixels,
        )
    layers = cache_of(outputs).layers
    keys, values = ([getattr(layer, name)[0] for layer in layers] for name in ("keys", "values"))
    return ReferenceOutput(outputs.logits[0], keys, values, ~dropped)


def generate_hidden(
    stock, prompt: dict, keep_mask: torch.Tensor, glimpse_layer: int, num_tokens: int
) -> torch.Tensor:
    """Greedy completion `(num_tokens,)`, re-running everything for every token."""
    completion = torch.empty(0, dtype=torch.long)
    for _ in range(num_tokens):
        logits = run_hidden(stock, prompt, completion, keep_mask, glimpse_layer).logits
        completion = torch.cat([completion, logits[-1:].argmax(-1)])
    return completion


def visual_positions(stock, prompt: dict) -> list[int]:
    """Where in the prompt its n visual tokens are."""
    names = ("image_token_id", "video_token_id")
    visual = {getattr(stock.config, name) for name in names if hasattr(stock.config, name)}
    ids = prompt["input_ids"][0].tolist()
    placeholders = [i for i, token in enumerate(ids) if token in visual]
    if prompt.get("vision_feature_select_strategy") == "full":  # each image's class token first
        return [place for i, place in enumerate(placeholders) if i % (SIDE**2 + 1)]
    if "image_sizes" not in prompt:
        return placeholders
    visual = [view for size in prompt["image_sizes"].tolist() for view in _is_visual(size)]
    return [place for place, counts in zip(placeholders, visual, strict=True) if counts]


def _is_visual(image_size: list[int]) -> list[bool]:
    """For each placeholder of a LLaVA-NeXT image, False where it ends a row of the grid."""
    rows, columns = grid_of(*(side // PATCH for side in image_size))
    return [True] * SIDE**2 + ([True] * columns + [False]) * rows


def dropped_positions(stock, prompt: dict, keep_mask: torch.Tensor) -> torch.Tensor:
    """`(P,)` bool, True at the visual tokens that are not kept."""
    dropped = torch.zeros(prompt["input_ids"].shape[1], dtype=torch.bool)
    for position, kept in zip(visual_positions(stock, prompt), keep_mask.tolist(), strict=True):
        dropped[position] = not kept
    return dropped


def allowed_attention(dropped: torch.Tensor, prompt_length: int, prunes: bool) -> torch.Tensor:
    """Which key (column) each query (row) may see: `(P + T, P + T)` bool.

    Nothing sees what comes later. Completion rows never see a dropped key; prompt rows do not where
    the layer `prunes`. Everything sees itself (a dropped token too, which nobody reads).
    """
    dropped = dropped.tolist()

    def allowed(query: int, key: int) -> bool:
        hidden = dropped[key] and (prunes or query >= prompt_length)
        return key == query or (key < query and not hidden)

    places = range(len(dropped))
    return torch.tensor([[allowed(query, key) for key in places] for query in places])


def positions(stock, prompt: dict, length: int) -> torch.Tensor:
    """Rotary positions `(..., 1, length)`: the stock ones of the prompt, then one more a token.

    `generate` counts on from the last token, which a long video before it may have overtaken.
    """
    prompt_length = prompt["input_ids"].shape[1]
    if stock.config.model_type not in ("qwen2_5_vl", "qwen3_vl"):
        return torch.arange(length)[None]
    if "image_grid_thw" in prompt or "video_grid_thw" in prompt:
        names = ("image_grid_thw", "video_grid_thw", "mm_token_type_ids")
        arguments = {name: prompt[name] for name in names if name in prompt}
        of_prompt, _ = stock.model.get_rope_index(prompt["input_ids"], **arguments)
    else:
        of_prompt = torch.arange(prompt_length).expand(3, 1, -1)
    of_completion = torch.arange(1, length - prompt_length + 1) + of_prompt[..., -1:]
    return torch.cat([of_prompt, of_completion], dim=-1)


@contextmanager
def attention_restricted_to(stock, masks: list[torch.Tensor]):
    """Give each decoder layer its own mask `(queries, keys)` bool, whatever the model built."""

    def impose(mask: torch.Tensor) -> Callable:
        forbidden = torch.finfo(torch.float32).min
        additive = torch.zeros(mask.shape).masked_fill(~mask, forbidden)[None, None]
        return lambda layer, args, kwargs: (args, kwargs | {"attention_mask": additive})

    layers = stock.model.language_model.layers
    hooks = [
        layer.register_forward_pre_hook(impose(mask), with_kwargs=True)
        for layer, mask in zip(layers, masks, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def select_slowly(
    importance: list[float], threshold: float, max_ratio: float | None, min_tokens: int
) -> list[bool]:
    """The selection rule for the visual tokens of one prompt, in plain Python.

    Above the threshold; at most the share `max_ratio`; at least `min_tokens`; of equals the first.
    """
    total = len(importance)
    best_first = sorted(range(total), key=lambda token: (-importance[token], token))
    probabilities = torch.tensor(importance).sigmoid()
    kept = {token for token in range(total) if probabilities[token] > threshold}
    if max_ratio is not None and len(kept) > max_ratio * total:
        kept = set(best_first[: int(max_ratio * total)])
    if len(kept) < min_tokens:
        kept = set(best_first[:min_tokens])
    return [token in kept for token in range(total)]


def score_slowly(stock, glimpse, config, prompt: dict) -> torch.Tensor:
    """Importance logits `(n,)` of a prompt with images or videos, not both.

    Reads the weights in `glimpse`, appends the glimpse token to the prompt of the stock model,
    takes its query against the keys of the attention layers, and evaluates the predictor token by
    token (paper, sections 3.1 and 3.2).
    """
    weights = weights_of(glimpse)
    hidden_states, keys, position = _run_with_glimpse(stock, weights, config, prompt)
    visual = visual_positions(stock, prompt)
    columns = [
        _attention_of_last(stock, layer, hidden_states[layer][-1], keys[layer], position)
        for layer in config.attention_layers
    ]  # each (heads, keys)
    if config.attention_scores == "log_probabilities":
        columns = [column.log_softmax(-1) for column in columns]
    return predict_slowly(stock, weights, config, prompt, torch.cat(columns)[:, visual].T)


def weights_of(glimpse) -> dict[str, torch.Tensor]:
    """The glimpse's weights by name."""
    return {name: weight.detach() for name, weight in glimpse.state_dict().items()}


def predict_slowly(stock, weights: dict, config, prompt: dict, attention) -> torch.Tensor:
    """Importance logits `(n,)` of a prompt's visual tokens.

    Args:
        attention: `(n, attention_layers * heads)`, what the glimpse token's attention says of each.
    """
    features, tokens = _tapped_features(stock, config.vision_layers, prompt)
    return _predict(weights, config, attention, features, tokens)


class _Token(NamedTuple):
    """A visual token: the image and frame it belongs to, where in it, and in which window."""

    image: int
    frame: int
    row: int
    column: int
    window: tuple[int, int]


def glimpse_vectors(weights: dict, config, layer: int, norm_eps: float) -> torch.Tensor | None:
    """Normalised projections of a layer's glimpse embeddings `(tokens, hidden)`."""
    if layer not in config.glimpse_embedding_layers:
        return None
    embeddings = weights["token.embeddings"][config.glimpse_embedding_layers.index(layer)]
    vectors = embeddings @ weights["token.projection.weight"].T + weights["token.projection.bias"]
    if config.glimpse_norm == "rms_norm":
        return rms_norm(vectors, weights["token.norm.weight"], norm_eps)
    scale, shift = weights["token.norm.weight"], weights["token.norm.bias"]
    return torch.nn.functional.layer_norm(vectors, scale.shape, scale, shift, norm_eps)


def rms_norm(states: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return weight * states / (states.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def embeddings_of(stock, prompt: dict) -> torch.Tensor:
    """What the decoder is given, `(1, P, hidden)`: words and encoded images in their places."""
    return _given_to_decoder(stock, prompt)["inputs_embeds"]


def added_between_layers(stock, prompt: dict) -> list[torch.Tensor]:
    """What is added to hidden states behind layer 0, 1, ...: `(P, hidden)` each, zeros at words."""
    given = _given_to_decoder(stock, prompt)
    if given.get("visual_pos_masks") is None:
        return []
    places = [i for i, visual in enumerate(given["visual_pos_masks"][0].tolist()) if visual]
    added = []
    for features in given["deepstack_visual_embeds"]:
        added.append(torch.zeros_like(given["inputs_embeds"][0]))
        for place, feature in zip(places, features, strict=True):
            added[-1][place] = feature
    return added


def _given_to_decoder(stock, prompt: dict) -> dict:
    captured = {}

    def note(module, args, kwargs):
        captured.update(kwargs)

    hook = stock.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    pixels = {name: prompt[name] for name in PIXEL_INPUTS if name in prompt}
    length = prompt["input_ids"].shape[1]
    stock(input_ids=prompt["input_ids"], position_ids=positions(stock, prompt, length), **pixels)
    hook.remove()
    return captured


def _run_with_glimpse(stock, weights: dict, config, prompt: dict):
    """Inputs `(P + g, hidden)` of each layer, its keys, and the last token's position."""
    text_model, embeddings = stock.model.language_model, embeddings_of(stock, prompt)
    behind = added_between_layers(stock, prompt)
    length, count = prompt["input_ids"].shape[1], config.num_glimpse_tokens
    eps = config.get_text_config().rms_norm_eps
    added = [
        glimpse_vectors(weights, config, layer, eps) if count else None
        for layer in range(len(text_model.layers))
    ]
    if count:
        embeddings = torch.cat([embeddings, added[0][None]], dim=1)
    inputs = [None] * len(text_model.layers)

    def add_glimpse(index: int) -> Callable:
        def hook(layer, args, kwargs):
            states = args[0].clone()
            if 0 < index <= len(behind):
                states[0, :length] += behind[index - 1]
            if index > 0 and added[index] is not None:
                states[0, -count:] += added[index]
            inputs[index] = states[0]
            return (states, *args[1:]), kwargs

        return hook

    hooks = [
        layer.register_forward_pre_hook(add_glimpse(index), with_kwargs=True)
        for index, layer in enumerate(text_model.layers)
    ]
    position_ids = positions(stock, prompt, length + count)
    outputs = text_model(inputs_embeds=embeddings, position_ids=position_ids, use_cache=True)
    for hook in hooks:
        hook.remove()
    keys = [layer.keys[0] for layer in cache_of(outputs).layers]
    return inputs, keys, position_ids.flatten()[-1].item()


def _attention_of_last(stock, layer: int, hidden, keys, position: int) -> torch.Tensor:
    """Scaled products `(heads, keys)` of one token's query with rotated keys."""
    config = stock.config.get_text_config()
    decoder_layer = stock.model.language_model.layers[layer]
    normed = rms_norm(hidden, decoder_layer.input_layernorm.weight, config.rms_norm_eps)
    heads, size = config.num_attention_heads, decoder_layer.self_attn.head_dim
    query = decoder_layer.self_attn.q_proj(normed).view(heads, size)
    if config.model_type == "qwen3_vl_text":
        query = rms_norm(query, decoder_layer.self_attn.q_norm.weight, config.rms_norm_eps)
    angles = [position * 10_000.0 ** (-2 * i / size) for i in range(size // 2)]
    scores = torch.empty(heads, keys.shape[1])
    for head in range(heads):
        rotated = _rotate(query[head], angles)
        shared = head * config.num_key_value_heads // heads
        for token in range(keys.shape[1]):
            scores[head, token] = rotated @ keys[shared, token] / math.sqrt(size)
    return scores


def _rotate(vector: torch.Tensor, angles: list[float]) -> torch.Tensor:
    """Turn the pair `(i, i + size / 2)` of a vector `(size,)` by the i-th angle."""
    half, turned = len(angles), torch.empty_like(vector)
    for i, angle in enumerate(angles):
        first, second = vector[i], vector[i + half]
        turned[i] = first * math.cos(angle) - second * math.sin(angle)
        turned[i + half] = second * math.cos(angle) + first * math.sin(angle)
    return turned


def _tapped_features(stock, vision_layers: list[int], prompt: dict):
    """What conditions the predictor, as `(n, width)` a layer, and the n tokens."""
    family = dict.fromkeys(("qwen2_5_vl", "qwen3_vl"), _features_of_qwen)
    family["llava"] = _features_of_llava
    return family.get(stock.config.model_type, _features_of_llava_next)(
        stock, vision_layers, prompt
    )


def _features_of_llava(stock, vision_layers: list[int], prompt: dict):
    """Hidden states without the class token, patch after patch."""
    states = _hidden_states(stock, prompt["pixel_values"])
    images = range(len(prompt["pixel_values"]))
    tokens = [
        _Token(image, 0, row, column, (0, 0))
        for image, row, column in product(images, range(SIDE), range(SIDE))
    ]
    picked = [(token.image, 1 + token.row * SIDE + token.column) for token in tokens]
    return [torch.stack([states[layer][at] for at in picked]) for layer in vision_layers], tokens


def _features_of_llava_next(stock, vision_layers: list[int], prompt: dict):
    """Of each image the base view, then the grid: each token looked up in its tile."""
    tokens, picked = [], []
    for image, size in enumerate(prompt["image_sizes"].tolist()):
        height, width = (side // PATCH for side in size)
        rows, columns = grid_of(height, width)
        down, across = best_tiles(height, width)
        top, left = (down * SIDE - rows) // 2, (across * SIDE - columns) // 2
        for row, column in product(range(SIDE), range(SIDE)):
            tokens.append(_Token(image, 0, row, column, (0, 0)))
            picked.append((image, 0, 1 + row * SIDE + column))
        for row, column in product(range(rows), range(columns)):
            tokens.append(_Token(image, 1, row, column, (0, 0)))
            tile = 1 + (top + row) // SIDE * across + (left + column) // SIDE
            patch = (top + row) % SIDE * SIDE + (left + column) % SIDE
            picked.append((image, tile, 1 + patch))
    states = [_hidden_states(stock, tiles) for tiles in prompt["pixel_values"]]
    features = [
        torch.stack([states[image][layer][tile, patch] for image, tile, patch in picked])
        for layer in vision_layers
    ]
    return features, tokens


def _hidden_states(stock, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of CLIP's tower: the embeddings, then each block's output."""
    return stock.model.vision_tower(pixels, output_hidden_states=True).hidden_states


def _features_of_qwen(stock, vision_layers: list[int], prompt: dict):
    """Output of vision blocks, averaged over a token's patches, in raster order."""
    captured = {}

    def capture(index: int) -> Callable:
        def hook(block, args, output):
            captured[index] = output

        return hook

    blocks = stock.model.visual.blocks
    hooks = [blocks[i].register_forward_hook(capture(i)) for i in set(vision_layers)]
    grids = prompt.get("image_grid_thw", prompt.get("video_grid_thw"))
    pixels = prompt.get("pixel_values", prompt.get("pixel_values_videos"))
    stock.model.visual(pixels, grid_thw=grids)
    for hook in hooks:
        hook.remove()
    vision = stock.config.vision_config
    tokens = _tokens(grids.tolist(), vision)
    in_window_order = sorted(range(len(tokens)), key=lambda i: (*_window_key(tokens[i]), i))
    patches = vision.spatial_merge_size**2
    features = []
    for layer in vision_layers:
        raster = captured[layer].new_empty(len(tokens), captured[layer].shape[-1])
        for place, token in enumerate(in_window_order):
            raster[token] = captured[layer][place * patches : (place + 1) * patches].mean(0)
        features.append(raster)
    return features, tokens


def _frame_key(token: _Token) -> tuple:
    return token.image, token.frame


def _window_key(token: _Token) -> tuple:
    return token.image, token.frame, *token.window


def _tokens(grids: list[list[int]], vision) -> list[_Token]:
    """The visual tokens of `(frames, height, width)` patch grids, in raster order.

    Without windows all of a frame is one.
    """
    window = getattr(vision, "window_size", math.inf)
    side, tokens = window // vision.patch_size // vision.spatial_merge_size, []
    for image, (frames, height, width) in enumerate(grids):
        rows, columns = height // vision.spatial_merge_size, width // vision.spatial_merge_size
        for frame, row, column in product(range(frames), range(rows), range(columns)):
            tokens.append(_Token(image, frame, row, column, (row // side, column // side)))
    return tokens


def _predict(weights: dict, config, attention, features, tokens: list[_Token]) -> torch.Tensor:
    """The visual importance predictor, one token, one head and one key at a time."""
    weights = {name.removeprefix("predictor."): weight for name, weight in weights.items()}

    def linear(name: str, states: torch.Tensor) -> torch.Tensor:
        bias = weights.get(f"{name}.bias", 0.0)
        return states @ weights[f"{name}.weight"].T + bias

    hidden = linear("attention_projection", attention)  # (n, size)
    for index, tapped in enumerate(features):
        prefix = f"layers.{index}"
        normed = rms_norm(hidden, weights[f"{prefix}.attention_norm.weight"])
        joint = normed
        if config.predictor_use_vision:
            joint = torch.cat([normed, linear(f"condition_projections.{index}", tapped)], dim=-1)
        query, key, value = (
            linear(f"{prefix}.attention.{name}_proj", states)
            for name, states in (("q", joint), ("k", joint), ("v", normed))
        )
        mixed = _attend_slowly(query, key, value, tokens, config)
        hidden = hidden + linear(f"{prefix}.attention.o_proj", mixed)
        normed = rms_norm(hidden, weights[f"{prefix}.mlp_norm.weight"])
        gate = linear(f"{prefix}.mlp.gate_proj", normed)
        up = linear(f"{prefix}.mlp.up_proj", normed)
        hidden = hidden + linear(f"{prefix}.mlp.down_proj", gate * gate.sigmoid() * up)
    return linear("output_projection", hidden)[:, 0]


def _attend_slowly(query, key, value, tokens: list[_Token], config) -> torch.Tensor:
    """Attention of each token to the tokens of its image (or window): `(n, value size)`."""
    heads = config.predictor_num_heads
    query, key = (_rotate_by_place(states, tokens, heads) for states in (query, key))
    values = value.unflatten(-1, (heads, -1))
    mixed = torch.zeros_like(values)
    group = _window_key if config.predictor_windowed else _frame_key
    for i, token in enumerate(tokens):
        seen = [j for j, other in enumerate(tokens) if group(other) == group(token)]
        for head in range(heads):
            scale = math.sqrt(query.shape[-1])
            scores = torch.stack([query[i, head] @ key[j, head] / scale for j in seen])
            for weight, j in zip(scores.softmax(0), seen, strict=True):
                mixed[i, head] += weight * values[j, head]
    return mixed.flatten(1)


def _rotate_by_place(states: torch.Tensor, tokens: list[_Token], heads: int) -> torch.Tensor:
    """Turn `(n, heads * size)` by 2-D positions: `(n, heads, size)`."""
    states = states.unflatten(-1, (heads, -1)).clone()
    size = states.shape[-1]
    frequencies = [10_000.0 ** (-4 * i / size) for i in range(size // 4)]
    for i, token in enumerate(tokens):
        angles = [place * f for place in (token.row, token.column) for f in frequencies]
        for head in range(heads):
            states[i, head] = _rotate(states[i, head], angles)
    return states
