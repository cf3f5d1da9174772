"""Before the encoder: patches that say nothing new are neither encoded nor decoded.

The slow way encodes whole images while what is left out is hidden in the encoder
(`encoder_reference.py`), and hides it in every layer of the stock decoder.
"""

import pytest
import torch
from conftest import MERGE, PATCH, TEMPORAL_PATCH, build_batch, build_models, has_windows
from encoder_reference import encode_slowly
from generation_checks import (
    assert_near,
    generate,
    step_logits,
    threshold_that_keeps,
)
from generation_prompts import random_keep
from reference import allowed_attention, attention_restricted_to, positions
from test_prefix import assert_equals_fresh, laid_out
from test_turns import conversation, follow
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from modeling_glimpseprune.redundant_patches import telling_tokens
from modeling_glimpseprune.stock import cache_of, given_cache
from modeling_glimpseprune.visual_features import token_geometry

PROMPTS = {
    "one image": [[3, (3, 5), 4]],
    "several images": [[2, (2, 3), 1, (3, 1), 3]],
    "batch": [[2, (2, 3), 1, (3, 1), 3], [5, (2, 2), 2], [1, (3, 4), 2]],
    "video": [[2, (2, 2, 3), 4]],
    "image and video": [[2, (3, 2), 1, (2, 2, 3), 4]],
}
K = 2
CLIP = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
KINDS = {"image": "pixel_values", "video": "pixel_values_videos"}


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def family(request):
    return request.param


@pytest.fixture(scope="module", params=[K, 0], ids=["late", "early"])
def models(request, family):
    fields = {"glimpse_layer": K, "prune_layer": request.param}
    return build_models(3, glimpse=fields, num_layers=4, vision_depth=4, window=2, family=family)


def some(batch, seed: int = 0, share: float = 0.6) -> torch.Tensor:
    """A random mask that leaves every frame its first token."""
    keep = random_keep(batch, seed, share)
    start = 0
    for _, _, (frames, height, width) in batch.visuals:
        for frame in range(frames):
            keep[start + frame * height * width] = True
        start += frames * height * width
    return keep


def embedded_slowly(stock, batch, encode: torch.Tensor) -> list[torch.Tensor]:
    """Embeddings `(batch, length, hidden)` of whole prompts, with images as `encode` lets see.

    Behind them, of Qwen3-VL, what is added at the images behind decoder layers, zeros elsewhere.
    """
    ids = batch.inputs["input_ids"]
    embeddings = stock.get_input_embeddings()(ids)
    masks = {kind: [] for kind in KINDS}
    grids = {kind: [] for kind in KINDS}
    sizes = [frames * height * width for _, _, (frames, height, width) in batch.visuals]
    for (_, kind, grid), mask in zip(batch.visuals, encode.split(sizes), strict=True):
        masks[kind].append(mask)
        grids[kind].append(grid)
    layers = None
    for kind, name in KINDS.items():
        if grids[kind]:
            keep = torch.cat(masks[kind])
            found = encode_slowly(stock.model.visual, batch.inputs[name], grids[kind], keep, 2)
            place = (ids == getattr(stock.config, f"{kind}_token_id"))[..., None]
            if layers is None:
                layers = [embeddings, *(torch.zeros_like(embeddings) for _ in found[1:])]
            layers = [
                layer.masked_scatter(place, rows) for layer, rows in zip(layers, found, strict=True)
            ]
    return layers


def logits_slowly(stock, batch, row: int, encode, keep, layer: int, completion) -> torch.Tensor:
    """Logits of a completion of one row: what is not encoded is hidden everywhere.

    Args:
        encode, keep: bool over the row's visual tokens.
        layer: P, above which dropped tokens are hidden from the prompt too.
    """
    prompt = batch.rows[row]
    ids = torch.cat([prompt["input_ids"], completion[None, :-1]], dim=1)
    length, prompt_length = ids.shape[1], prompt["input_ids"].shape[1]
    visual = torch.isin(
        ids[0], torch.tensor([stock.config.image_token_id, stock.config.video_token_id])
    )
    unseen, dropped = (torch.zeros(length, dtype=torch.bool) for _ in range(2))
    unseen[visual.nonzero()[:, 0]] = ~encode
    dropped[visual.nonzero()[:, 0]] = ~(keep & encode)
    masks = []
    for index in range(stock.config.get_text_config().num_hidden_layers):
        of_dropped = allowed_attention(dropped, prompt_length, index > layer)
        masks.append(of_dropped & (~unseen | torch.eye(length, dtype=torch.bool)))
    whole = embedded_slowly(stock, batch, batch_mask(batch, row, encode))
    real = batch.inputs["attention_mask"][row].bool()
    embeddings, *added = (each[row][real] for each in whole)
    said = stock.get_input_embeddings()(completion[:-1])
    additions = {}
    if added:
        additions = {
            "visual_pos_masks": visual[None],
            "deepstack_visual_embeds": [each[visual[: len(each)]] for each in added],
        }
    with attention_restricted_to(stock, masks):
        states = stock.model.language_model(
            inputs_embeds=torch.cat([embeddings, said])[None],
            position_ids=positions(stock, prompt, length),
            **additions,
        ).last_hidden_state
    return stock.lm_head(states)[0, prompt_length - 1 :]


def batch_mask(batch, row: int, of_row: torch.Tensor) -> torch.Tensor:
    """A mask over the whole batch that is `of_row` in one row."""
    parts = [torch.ones(count, dtype=torch.bool) for count in batch.visual_counts]
    parts[row] = of_row
    return torch.cat(parts)


@pytest.mark.parametrize("name", PROMPTS)
@torch.no_grad()
def test_a_part_equals_the_whole_with_the_rest_hidden(models, name, family):
    """Embeddings of what is encoded; the stock encoder itself runs over the part alone."""
    batch = build_batch(PROMPTS[name], family=family)
    for seed in range(3):
        encode = some(batch, seed)
        backbone, inputs = models.pruned.model, dict(batch.inputs)
        choice = backbone.encode_choice({"visual_encode_mask": encode})
        encoded = backbone._encode(None, inputs, True, choice, inputs["input_ids"])
        ids = batch.inputs["input_ids"]
        expected = embedded_slowly(models.stock, batch, encode)
        for kind, features in encoded.items():
            place = ids == getattr(models.stock.config, f"{kind}_token_id")
            layers = [features.pooler_output, *(features.deepstack_features or ())]
            found = [torch.cat(list(layer)) for layer in layers]
            seen = torch.cat(
                [
                    torch.ones(len(view.places), dtype=torch.bool)
                    if view.encoded is None
                    else view.encoded
                    for (view,) in features.glimpse_views
                ]
            )
            for rows, slow in zip(found, expected, strict=True):
                assert_near(rows[seen], slow[place][seen])
                assert not rows[~seen].any()


@pytest.mark.feature("parts of images encoded")
@pytest.mark.parametrize("name", PROMPTS)
@torch.no_grad()
def test_generation_equals_hidden(models, name, family):
    batch, layer = build_batch(PROMPTS[name], family=family), models.pruned.config.prune_layer
    encode, keep = some(batch), random_keep(batch, 5, 0.6)
    masks = {"visual_encode_mask": encode, "visual_keep_mask": keep}
    output = generate(models.pruned, batch.inputs, 4, **masks)
    record = cache_of(output).glimpse
    assert torch.equal(record.keep_mask, keep & encode)
    assert torch.equal(record.encoded, encode)
    for row, (of_row, kept) in enumerate(zip(batch.split(encode), batch.split(keep), strict=True)):
        steps = step_logits(output, row)
        completion = output.sequences[row, -len(steps) :]
        expected = logits_slowly(models.stock, batch, row, of_row, kept, layer, completion)
        assert_near(steps, expected)


@pytest.mark.parametrize("name", PROMPTS)
@torch.no_grad()
def test_everything_encoded_is_off(models, name, family):
    batch = build_batch(PROMPTS[name], family=family)
    everything = torch.ones(batch.num_visual, dtype=torch.bool)
    off = generate(models.pruned, batch.inputs, 4, max_keep_ratio=0.5)
    on = generate(models.pruned, batch.inputs, 4, max_keep_ratio=0.5, visual_encode_mask=everything)
    random_pixels = generate(
        models.pruned, batch.inputs, 4, max_keep_ratio=0.5, redundant_patches=0
    )
    for output in (on, random_pixels):
        assert torch.equal(output.sequences, off.sequences)
        assert all(map(torch.equal, output.logits, off.logits))
        assert cache_of(output).glimpse.encoded is None


@pytest.mark.feature("parts of images encoded")
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("name", PROMPTS)
@torch.no_grad()
def test_the_glimpse_chooses_among_what_was_encoded(name, windowed, family):
    """A batch equals its rows; importance is -inf where nothing was encoded."""
    if windowed and not has_windows(family):
        pytest.skip("this encoder has no windows")
    fields = {"glimpse_layer": K, "prune_layer": 1, "predictor_windowed": windowed}
    model = build_models(
        3, glimpse=fields, num_layers=4, vision_depth=4, window=2, family=family
    ).pruned
    batch = build_batch(PROMPTS[name], family=family)
    encode = some(batch)
    whole = model.glimpse(**batch.inputs, visual_encode_mask=encode)
    threshold = threshold_that_keeps(whole.importance[encode], 0.5)
    settings = {"prune_threshold": threshold}
    output = generate(model, batch.inputs, 3, visual_encode_mask=encode, **settings)
    record = cache_of(output).glimpse
    assert torch.equal(record.importance == float("-inf"), ~encode)
    assert not record.keep_mask[~encode].any() and record.keep_mask.any()
    for row, (prompt, of_row) in enumerate(zip(batch.rows, batch.split(encode), strict=True)):
        alone = generate(model, prompt, 3, visual_encode_mask=of_row, **settings)
        assert torch.equal(cache_of(alone).glimpse.keep_mask, batch.split(record.keep_mask)[row])
        assert_near(step_logits(output, row), step_logits(alone, 0))
    visuals = record.visuals
    assert torch.equal(torch.cat([visual.encoded for visual in visuals]), encode)


@torch.no_grad()
def test_shares_are_of_all_tokens(family):
    """`max_keep_ratio` counts what was left out as dropped."""
    model = build_models(3, glimpse={"glimpse_layer": 1}, family=family).pruned
    batch = build_batch([[3, (4, 5), 4]], family=family)
    encode = torch.arange(20) % 2 == 0
    settings = {"visual_encode_mask": encode, "prune_threshold": 0.0}
    assert model.glimpse(**batch.inputs, **settings).kept == 10
    assert model.glimpse(**batch.inputs, **settings, max_keep_ratio=0.4).kept == 8


@torch.no_grad()
def test_layers_and_attentions_as_the_caller_sees_the_prompt(family):
    model = build_models(
        3,
        "eager",
        glimpse={"glimpse_layer": K, "prune_layer": 1},
        num_layers=4,
        family=family,
    ).pruned
    batch = build_batch(PROMPTS["batch"], family=family)
    encode, keep = some(batch), random_keep(batch, 5, 0.6)
    masks = {"visual_encode_mask": encode, "visual_keep_mask": keep}
    outputs = model(**batch.inputs, **masks, output_hidden_states=True, output_attentions=True)
    shape = batch.inputs["input_ids"].shape
    visual = torch.isin(batch.inputs["input_ids"], model.model.visual_token_ids)
    unseen = torch.zeros(shape, dtype=torch.bool).masked_scatter(visual, ~encode)
    for states in outputs.hidden_states:
        assert states.shape[:2] == shape and not states[unseen].any()
    for weights in outputs.attentions:
        assert weights.shape[2:] == (shape[1], shape[1])
        assert (
            not weights.transpose(1, 2)[unseen].any()
            and not weights.permute(0, 3, 1, 2)[unseen].any()
        )
        seen = weights.sum(-1).transpose(1, 2)[batch.inputs["attention_mask"].bool() & ~unseen]
        assert ((seen - 1).abs() < 1e-5).logical_or(seen == 0).all()


@pytest.mark.feature("parts of images encoded")
@torch.no_grad()
def test_prefixes_hold_what_was_encoded(models, family):
    model, batch = models.pruned, build_batch(PROMPTS["batch"], family=family)
    encode = some(batch)
    fresh = generate(model, batch.inputs, 3, visual_encode_mask=encode, max_keep_ratio=0.3)
    prefix = model.look(**batch.inputs, visual_encode_mask=encode)
    assert prefix.held.states.shape[1] < prefix.get_seq_length()
    inputs = laid_out(prefix, batch.inputs)
    over = generate(model, inputs | given_cache(prefix), 3, max_keep_ratio=0.3)
    assert_equals_fresh(over, fresh)


@torch.no_grad()
def test_a_prefix_and_an_own_image_each_in_part(models, tmp_path, family):
    model, batch = (
        models.pruned,
        build_batch([[2, (3, 4), 2, (2, 3), 3], [2, (3, 4), 1, (1, 3), 4]], family=family),
    )
    encode = some(batch)
    length = build_batch([[2, (3, 4)]], family=family).inputs["input_ids"].shape[1]
    first = torch.cat([part[:12] for part in batch.split(encode)])
    rest = torch.cat([part[12:] for part in batch.split(encode)])
    fresh = generate(model, batch.inputs, 3, visual_encode_mask=encode, max_keep_ratio=0.3)
    pixels = {name: each for name, each in batch.inputs.items()}
    prefix = model.look(**pixels, prefix_length=length, visual_encode_mask=first)
    prefix.save(tmp_path / "page")
    for each in (prefix, model.load_prefix(tmp_path / "page")):
        inputs = batch.inputs | laid_out(each, batch.inputs) | given_cache(each)
        over = generate(model, inputs, 3, visual_encode_mask=rest, max_keep_ratio=0.3)
        assert_equals_fresh(over, fresh)
        longer = model.look(**inputs, visual_encode_mask=rest)
        inputs = batch.inputs | laid_out(longer, batch.inputs) | given_cache(longer)
        assert_equals_fresh(generate(model, inputs, 3, max_keep_ratio=0.3), fresh)


@pytest.mark.feature("parts of images encoded")
@torch.no_grad()
def test_later_turns(models, family):
    """A later image in part, behind one in part; text behind both."""
    model = models.pruned
    first, second = (
        build_batch([[3, (2, 3), 4]] * 2, family=family),
        build_batch([[1, (2, 2), 3]] * 2, 1, family),
    )
    masks = [some(first), some(second, 1)]
    start = generate(model, first.inputs, 3, visual_encode_mask=masks[0], max_keep_ratio=0.5)
    kept = cache_of(start).glimpse.keep_mask
    said = start.sequences[:, first.inputs["input_ids"].shape[1] :]
    inputs = follow(first, second, start, conversation(first, second, said))
    later = generate(model, inputs, 3, visual_encode_mask=masks[1], max_keep_ratio=0.5)
    assert cache_of(later).get_seq_length() == later.sequences.shape[1] - 1
    # Row by row, the same: each turn's tokens stand where the others' do not reach.
    for row in range(2):
        of_row = [first.split(masks[0])[row], second.split(masks[1])[row]]
        begun = generate(
            model, first.rows[row], 3, visual_encode_mask=of_row[0], max_keep_ratio=0.5
        )
        assert torch.equal(cache_of(begun).glimpse.keep_mask, first.split(kept)[row])
        one = [
            each._replace(inputs=each.rows[row], rows=[each.rows[row]]) for each in (first, second)
        ]
        answer = begun.sequences[:, first.rows[row]["input_ids"].shape[1] :]
        both = conversation(
            *(each._replace(visual_counts=[each.visual_counts[row]]) for each in one), answer
        )
        inputs = follow(*one, begun, both)
        again = generate(model, inputs, 3, visual_encode_mask=of_row[1], max_keep_ratio=0.5)
        assert torch.equal(again.sequences[0, -3:], later.sequences[row, -3:])
        assert_near(step_logits(later, row), step_logits(again, 0))


@pytest.mark.feature("parts of images encoded")
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"use_cache": False}])
@torch.no_grad()
def test_ways_of_generating(models, options, family):
    model, batch = models.pruned, build_batch(PROMPTS["batch"], family=family)
    settings = {"visual_encode_mask": some(batch), "max_keep_ratio": 0.3, "max_new_tokens": 3}
    found = model.generate(**batch.inputs, **settings, **options)
    for row, encode in enumerate(batch.split(settings["visual_encode_mask"])):
        alone = model.generate(
            **batch.rows[row], **(settings | {"visual_encode_mask": encode}), **options
        )
        assert torch.equal(found[row, -3:], alone[0, -3:])


def test_in_place_over_a_look_needs_whole_images():
    model = build_models(3, glimpse={"glimpse_layer": 1}).pruned
    batch = build_batch([[2, (2, 3), 4]])
    encode = torch.tensor([True, False, True, True, False, True])
    with pytest.raises(ValueError, match="in_place over a prefix needs whole images"):
        model.look(**batch.inputs, in_place=True, visual_encode_mask=encode)
    part = model.look(**batch.inputs, visual_encode_mask=encode)
    behind = {"input_ids": batch.inputs["input_ids"][:, part.get_seq_length() :]}
    behind |= {"attention_mask": batch.inputs["attention_mask"], **given_cache(part)}
    with pytest.raises(ValueError, match="in_place over a prefix needs whole images"):
        model.model(**behind, in_place=True, only_glimpse=True, use_cache=True)


@torch.no_grad()
def test_answers_in_place_equal_hidden(family):
    """Without a glimpse token, which would stand between prompt and answer."""
    fields = {"glimpse_layer": 1, "num_glimpse_tokens": 0}
    models, batch = (
        build_models(3, glimpse=fields, num_layers=4, family=family),
        build_batch(PROMPTS["batch"], family=family),
    )
    encode = some(batch)
    length = batch.inputs["input_ids"].shape[1]
    found = models.pruned(
        **batch.inputs, prompt_length=length - 2, visual_encode_mask=encode, in_place=True
    ).logits
    for row, of_row in enumerate(batch.split(encode)):
        ids = batch.rows[row]["input_ids"]
        expected = logits_slowly(models.stock, batch, row, of_row, of_row, 1, ids[0, :1])
        assert_near(found[row, -1:], expected[-1:])


@torch.no_grad()
def test_a_soft_mask_at_its_ends_equals_a_hard_one(models, family):
    batch = build_batch(PROMPTS["batch"], family=family)
    encode, keep = some(batch), random_keep(batch, 5, 0.6)
    length = batch.inputs["input_ids"].shape[1]
    given = {"visual_encode_mask": encode, "prompt_length": length - 1}
    log_keep = torch.zeros(batch.num_visual).masked_fill(~keep, float("-inf"))
    soft = models.pruned(**batch.inputs, **given, visual_log_keep=log_keep).logits
    hard = models.pruned(**batch.inputs, **given, visual_keep_mask=keep).logits
    assert_near(soft[:, -2:], hard[:, -2:])


def test_training_in_place(models, family):
    """Stage 1's forward: logits of the completion as if the tokens were not there."""
    model = build_models(3, glimpse={"glimpse_layer": 1}, family=family).pruned
    batch = build_batch([[2, (2, 3), 4]], family=family)
    encode = torch.tensor([True, False, True, True, False, True])
    length = batch.inputs["input_ids"].shape[1]
    arguments = {"prompt_length": length - 2, "visual_encode_mask": encode}
    found = model(**batch.inputs, **arguments, in_place=True)
    record = cache_of(found).glimpse
    scores = model.glimpse(
        **{
            name: each[:, : length - 2] if each.shape[-1] == length else each
            for name, each in batch.inputs.items()
        },
        visual_encode_mask=encode,
    )
    assert_near(record.importance[encode], scores.importance[encode])
    assert not record.keep_mask[~encode].any()
    found.logits[:, -1].sum().backward()
    assert model.model.glimpse.token.embeddings.grad.abs().max() > 0


def pixels_of(images: torch.Tensor, statistics: tuple = CLIP) -> torch.Tensor:
    """`(height, width, 3)` grey levels as the image processor hands them to the encoder."""
    side = MERGE * PATCH
    mean, deviation = map(torch.tensor, statistics)
    scaled = (images / 255 - mean) / deviation
    tokens = scaled.unfold(0, side, side).unfold(1, side, side)  # rows, columns, 3, side, side
    parts = tokens.unfold(3, PATCH, PATCH).unfold(4, PATCH, PATCH)
    patches = parts.permute(0, 1, 3, 4, 2, 5, 6).flatten(0, 3)  # tokens' patches, 3, P, P
    return patches[:, :, None].expand(-1, -1, TEMPORAL_PATCH, -1, -1).flatten(1)


@torch.no_grad()
def test_a_tolerance_is_in_grey_levels_of_the_familys_processor(models, family):
    """Noise over 20 grey levels, of which other statistics would make 11 or 37."""
    batch, side = build_batch([[2, (3, 4), 4]], family=family), MERGE * PATCH
    generator = torch.Generator().manual_seed(0)
    image = 120 + torch.randint(0, 21, (3 * side, 4 * side, 3), generator=generator)
    published = {"qwen2_5_vl": CLIP, "qwen3_vl": ([0.5] * 3, [0.5] * 3)}
    inputs = batch.inputs | {"pixel_values": pixels_of(image, published[family])}
    for tolerance, encoded in ((16, 12), (24, 1)):
        record = models.pruned.glimpse(**inputs, redundant_patches=tolerance)
        assert encoded == (12 if record.encoded is None else int(record.encoded.sum()))


class TestTellingTokens:
    SIDE = MERGE * PATCH

    def told(self, image: torch.Tensor, tolerance: float) -> torch.Tensor:
        rows, columns = (size // self.SIDE for size in image.shape[:2])
        geometry = token_geometry(torch.tensor([[1, rows, columns]]), [rows * columns])
        told = telling_tokens(pixels_of(image), geometry, tolerance, CLIP)
        return told.view(rows, columns)

    def page(self, rows: int = 4, columns: int = 5, grey: float = 250.0) -> torch.Tensor:
        return torch.full((rows * self.SIDE, columns * self.SIDE, 3), grey)

    def test_one_token_stands_for_an_even_page(self):
        told = self.told(self.page(), 0)
        assert told[0, 0] and told.sum() == 1

    def test_what_is_written_stays(self):
        page, side = self.page(), self.SIDE
        page[2 * side + 1, 3 * side + 2] = 0
        told = self.told(page, 0)
        assert told[2, 3] and told[0, 0]
        assert told.sum() == 2  # what is right of it is as the token above

    def test_noise_needs_a_tolerance(self):
        noise = torch.randint(-3, 4, self.page().shape, generator=torch.Generator().manual_seed(0))
        page = self.page(grey=240.0) + noise
        assert self.told(page, 0).all()
        assert self.told(page, 16).sum() == 1

    def test_a_slow_gradient_does_not_vanish(self):
        page = self.page(1, 40) + torch.arange(40 * self.SIDE)[None, :, None] * -0.5
        # A level reaches over 17 greys, which hold five means that lie 4 apart.
        assert self.told(page, 16).sum() >= 40 / 5

    def test_colours_differ(self):
        page, side = self.page(1, 4), self.SIDE
        page[:, 2 * side :, 2] -= 60
        assert self.told(page, 16).tolist() == [[True, False, True, False]]

    def test_frames_are_looked_at_one_by_one(self):
        geometry = token_geometry(torch.tensor([[2, 1, 2]]), [4])
        pixels = torch.zeros(4 * MERGE**2, 3 * TEMPORAL_PATCH * PATCH**2)
        assert telling_tokens(pixels, geometry, 0, CLIP).tolist() == [True, False, True, False]


class TestWithoutPruning:
    """`prune=False` answers from all patches, or says that they are not there."""

    ASKED = {"prune": False, "max_new_tokens": 2}
    OF_PREFIX = "this prefix lacks the patches .* look again with redundant_patches=False"

    @pytest.fixture
    def rows(self, models, family):
        """Two prompts, and what is encoded of them: a part of the second one's last image."""
        batch = build_batch([[3, (2, 3), 2, (1, 2), 3], [2, (2, 2), 1, (3, 2), 3]], family=family)
        encode = torch.ones(batch.num_visual, dtype=torch.bool)
        encode[-2:] = False
        return models.pruned, batch, encode

    @torch.no_grad()
    def test_prefixes_looked_at_in_part(self, rows, tmp_path):
        """New ones and loaded ones, from `generate` and `forward`; nothing is wrong with them."""
        model, batch, encode = rows
        prefix = model.look(**batch.inputs, visual_encode_mask=encode)
        prefix.save(tmp_path / "page")
        inputs = laid_out(prefix, batch.inputs)
        for each in (prefix, model.load_prefix(tmp_path / "page"), prefix.select_rows([0, 1])):
            with pytest.raises(ValueError, match=self.OF_PREFIX):
                model.generate(**inputs, **given_cache(each), **self.ASKED)
            for ask in (model, model.model):
                with pytest.raises(ValueError, match=self.OF_PREFIX):
                    ask(torch.tensor([[5, 6]] * 2), **given_cache(each), prune=False)
        assert len(generate(model, inputs | given_cache(prefix), 2, max_keep_ratio=0.5).logits) == 2

    @torch.no_grad()
    def test_prefixes_that_grew_by_a_part(self, rows, family):
        model, batch, encode = rows
        first = build_batch([[3, (2, 3)], [2, (2, 2)]], family=family).inputs
        lengths = first["attention_mask"].sum(1).tolist()
        prefix = model.look(**batch.inputs, prefix_length=lengths)
        inputs = batch.inputs | laid_out(prefix, batch.inputs) | given_cache(prefix)
        assert len(generate(model, inputs, 2, prune=False).logits) == 2
        behind = torch.cat([encode[6:8], encode[-6:]])
        longer = model.look(**inputs, visual_encode_mask=behind)
        with pytest.raises(ValueError, match=self.OF_PREFIX):
            model.generate(**laid_out(longer, batch.inputs), **given_cache(longer), **self.ASKED)

    @torch.no_grad()
    def test_rows_of_which_nothing_was_left_out(self, models, rows):
        """Of a prefix whose other row lacks patches; the stock model's answer over whole images."""
        model, batch, encode = rows
        prefix = model.look(**batch.inputs, visual_encode_mask=encode).select_rows([0])
        prompt = batch.rows[0]
        over = generate(model, laid_out(prefix, prompt) | given_cache(prefix), 3, prune=False)
        stock = generate(models.stock, prompt, 3)
        assert_near(step_logits(over, 0), step_logits(stock, 0))

    @torch.no_grad()
    def test_looks_that_left_nothing_out(self, models, rows):
        """Random pixels repeat nowhere."""
        model, batch, _ = rows
        prefix = model.look(**batch.inputs, redundant_patches=0)
        over = generate(model, laid_out(prefix, batch.inputs) | given_cache(prefix), 3, prune=False)
        stock = generate(models.stock, batch.inputs, 3)
        for row in range(2):
            assert_near(step_logits(over, row), step_logits(stock, row))

    @pytest.mark.parametrize("turn", [[[3]] * 2, [[1, (2, 2), 3]] * 2], ids=["text", "image"])
    @torch.no_grad()
    def test_later_turns_over_a_cache_that_lacks_some(self, rows, family, turn):
        model, first, encode = rows
        second = build_batch(turn, 1, family)
        for mask, refused in ((encode, True), (torch.ones_like(encode), False)):
            start = generate(model, first.inputs, 3, visual_encode_mask=mask, max_keep_ratio=0.5)
            said = start.sequences[:, first.inputs["input_ids"].shape[1] :]
            inputs = follow(first, second, start, conversation(first, second, said))
            if refused:
                with pytest.raises(ValueError, match="this cache lacks .* without the cache"):
                    model.generate(**inputs, **self.ASKED)
            else:
                assert len(generate(model, inputs, 2, prune=False).logits) == 2

    @torch.no_grad()
    def test_caches_of_scored_prompts(self, rows):
        """Scoring in place keeps every token, and a cache of it lacks what was not encoded."""
        model, batch, encode = rows
        scored = {"in_place": True, "prune_layer": K}
        scored["prompt_length"] = batch.inputs["input_ids"].shape[1]
        for mask, refused in ((encode, True), (torch.ones_like(encode), False)):
            cache = cache_of(model(**batch.inputs, visual_encode_mask=mask, **scored))
            later = {"input_ids": torch.tensor([[5, 6]] * 2), **given_cache(cache)}
            if refused:
                with pytest.raises(ValueError, match="this cache lacks .* without the cache"):
                    model(**later, prune=False)
            else:
                assert model(**later, prune=False).logits.shape[1] == 2

    @torch.no_grad()
    def test_turns_behind_one_that_lacks_some(self, rows, family, tmp_path):
        """A turn of whole images hides it neither from a third turn nor from a prefix behind it."""
        model, first, encode = rows
        second = build_batch([[1, (2, 2), 3]] * 2, 1, family)
        third = build_batch([[3]] * 2, 2, family)
        for mask, refused in ((encode, True), (torch.ones_like(encode), False)):
            start = generate(model, first.inputs, 3, visual_encode_mask=mask, max_keep_ratio=0.5)
            said = start.sequences[:, first.inputs["input_ids"].shape[1] :]
            both = conversation(first, second, said)
            inputs = follow(first, second, start, both)
            looked = model.look(**inputs)
            looked.save(tmp_path / "page")
            prefixes = (looked, model.load_prefix(tmp_path / "page"), looked.select_rows([1]))
            asked = [laid_out(looked, inputs) | given_cache(each) for each in prefixes[:2]]
            asked.append(laid_out(prefixes[2], both.rows[1]) | given_cache(prefixes[2]))
            whole_row = looked.select_rows([0])
            assert model.generate(
                **laid_out(whole_row, both.rows[0]), **given_cache(whole_row), **self.ASKED
            ).shape
            after = generate(model, inputs, 3, max_keep_ratio=0.5)
            assert cache_of(after).glimpse.encoded is None
            later = follow(both, third, after, third)
            if not refused:
                for each in (later, *asked):
                    assert len(generate(model, each, 2, prune=False).logits) == 2
                continue
            with pytest.raises(ValueError, match="this cache lacks .* without the cache"):
                model.generate(**later, **self.ASKED)
            for each in asked:
                with pytest.raises(ValueError, match=self.OF_PREFIX):
                    model.generate(**each, **self.ASKED)


class TestBadInput:
    @pytest.fixture
    def asked(self, models, family):
        return models.pruned, build_batch([[2, (2, 3), 4]], family=family).inputs

    @pytest.mark.parametrize("tolerance", [-1, 256, float("nan"), "16", True])
    def test_tolerances(self, asked, tolerance):
        model, inputs = asked
        with pytest.raises(ValueError, match="redundant_patches must be None, False, or grey"):
            model.generate(**inputs, redundant_patches=tolerance, max_new_tokens=2)

    def test_masks(self, asked):
        model, inputs = asked
        for mask, sentence in (
            (torch.ones(5, dtype=torch.bool), r"visual_encode_mask must have shape \(6,\)"),
            (torch.ones(6), "visual_encode_mask must be a bool tensor"),
            (torch.zeros(6, dtype=torch.bool), "leaves frame 0 of visual 0 without a token"),
        ):
            with pytest.raises(ValueError, match=sentence):
                model.generate(**inputs, visual_encode_mask=mask, max_new_tokens=2)

    def test_without_pruning(self, asked):
        model, inputs = asked
        with pytest.raises(ValueError, match="pixels of a prompt that is pruned"):
            model.generate(**inputs, redundant_patches=0, prune=False, max_new_tokens=2)

    def test_visuals_encoded_in_part_without_pruning(self, asked):
        model, inputs = asked
        inputs = dict(inputs)
        blank, grid = torch.zeros_like(inputs.pop("pixel_values")), inputs["image_grid_thw"]
        features = model.model.encode_telling("image", 0, pixel_values=blank, image_grid_thw=grid)
        inputs["mm_encoder_outputs"] = {"image": features}
        with pytest.raises(ValueError, match="prune=False answers from all"):
            model(**inputs, prune=False)

    def test_a_grid_that_lost_what_it_stands_for(self, models):
        """On releases whose encoder asks its own methods, where device hooks copy arguments."""
        with pytest.raises(RuntimeError, match="a copy of the grid that stands for a part"):
            models.pruned.model.visual.rot_pos_emb(torch.tensor([[1, 8, 1]]))

    def test_a_prefix_is_encoded_already(self, asked):
        model, inputs = asked
        prefix = given_cache(model.look(**inputs))
        with pytest.raises(ValueError, match="visuals behind the prefix, and there are none"):
            model.generate(**inputs, **prefix, redundant_patches=0, max_new_tokens=2)
        question = {"input_ids": torch.tensor([[5, 6]]), **prefix, "redundant_patches": 0}
        with pytest.raises(ValueError, match="visuals behind the prefix, and there are none"):
            model(**question)

    @pytest.mark.parametrize("other", ["llava", "llava_next"])
    def test_other_families(self, other):
        model = build_models(family=other).pruned
        inputs = build_batch([[2, (2, 3), 4]], family=other).inputs
        with pytest.raises(ValueError, match="takes whole images only"):
            model.generate(**inputs, redundant_patches=0, max_new_tokens=2)
        model.config.redundant_patches = 0
        with pytest.raises(ValueError, match="takes whole images only"):
            model.generate(**inputs, max_new_tokens=2)

    def test_a_prompt_that_ends_unseen(self, models, family):
        inputs = build_batch([[2, (2, 3)]], family=family).inputs
        cut = {
            name: each[:, :-1] if each.shape[-1] == 10 else each for name, each in inputs.items()
        }
        encode = torch.tensor([True] * 5 + [False])
        with pytest.raises(ValueError, match="ends in a visual token that was left out"):
            models.pruned.glimpse(**cut, visual_encode_mask=encode)
