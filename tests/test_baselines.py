"""Baselines against slow references: their scoring rules, and where they drop tokens."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import build_batch, build_models
from PIL import Image
from reference import (
    attention_restricted_to,
    generate_hidden,
    positions,
    visual_positions,
)

from glimpseprune.baselines.divprune import DivPrune, most_diverse
from glimpseprune.baselines.fastv import FastV
from glimpseprune.baselines.method import Method, PreparedBatch, TextOnly
from glimpseprune.baselines.model_sizes import ModelSizes
from glimpseprune.baselines.oracle_evidence import OracleEvidence
from glimpseprune.baselines.prompt_tokens import PromptTokens, budget_of
from glimpseprune.baselines.pyramiddrop import PyramidDrop
from glimpseprune.baselines.random_tokens import RandomTokens
from glimpseprune.baselines.raw_attention import RawGlimpseToken, RawLastToken
from glimpseprune.baselines.resized_image import ResizedImage, smaller_grid
from glimpseprune.baselines.scorer import AtGlimpseLayer, BeforeDecoder, keep_highest
from glimpseprune.baselines.uniform_grid import UniformGrid, grid_points
from glimpseprune.baselines.visionzip import VisionZip, zip_tokens
from glimpseprune.loading import TINY_MODEL, load_model
from glimpseprune.sample import Sample
from modeling_glimpseprune.stock import cache_of

LAYERS, K, NEW_TOKENS = 6, 2, 4
GRIDS = [(4, 5), (6, 3)]
RATIO = 0.3
WHOLE_IMAGE = SimpleNamespace(visible_box=lambda width, height: (0, 0, width, height))


@pytest.fixture(scope="module")
def models():
    glimpse = {"glimpse_layer": K, "vision_layers": [1], "attention_scores": "log_probabilities"}
    return build_models(num_layers=LAYERS, glimpse=glimpse)


@pytest.fixture(scope="module")
def eager_stock():
    return build_models(num_layers=LAYERS, attn_implementation="eager").stock


@pytest.fixture(scope="module")
def batch():
    """Two prompts of different lengths; the second is padded."""
    return build_batch([[3, GRIDS[0], 4], [1, GRIDS[1], 3]])


def prepared(batch) -> PreparedBatch:
    """A batch with evidence in the upper left quarter of the first image, none in the second."""
    samples = [
        Sample(None, "", "", boxes=((0, 0, 40, 40),), size=(100, 80), number=3),
        Sample(None, "", "", boxes=(), size=(60, 120), number=4),
    ]
    return PreparedBatch(samples, batch.inputs, batch.visual_counts, batch.inputs)


@torch.no_grad()
def answer(models, batch, method: Method):
    """Generated tokens of each row, and the kept tokens of each row by layer `(layers, n)`."""
    with method.applied(models.pruned, WHOLE_IMAGE, prepared(batch)) as application:
        generated = models.pruned.generate(
            **batch.inputs,
            **application.options,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
        )
    cache, length = cache_of(generated), batch.inputs["input_ids"].shape[1]
    if application.masks is None:
        kept = [cache.glimpse.keep_mask] * LAYERS
        assert (cache.layers[0].dropped > 0) == (not cache.glimpse.keep_mask.all())
    else:
        kept = application.masks.keep
    sizes = ModelSizes.of(models.pruned.config)
    counts = application.tokens_by_layer(cache, batch.visual_counts, sizes)
    rows = zip(*(batch.split(layer) for layer in kept), strict=True)
    return generated.sequences[:, length:], [torch.stack(row) for row in rows], counts


@torch.no_grad()
def run_masked(stock, prompt: dict, keep: list[list[bool]], completion: torch.Tensor, **outputs):
    """The stock model while layer i sees only the visual tokens that `keep[i]` has."""
    ids = torch.cat([prompt["input_ids"], completion.view(1, -1)], dim=1)
    length, visual = ids.shape[1], visual_positions(stock, prompt)
    masks = []
    for of_layer in keep:
        gone = {place for place, kept in zip(visual, of_layer, strict=True) if not kept}
        masks.append(
            torch.tensor(
                [
                    [key == query or (key < query and key not in gone) for key in range(length)]
                    for query in range(length)
                ]
            )
        )
    pixels = {name: prompt[name] for name in ("pixel_values", "image_grid_thw")}
    with attention_restricted_to(stock, masks):
        return stock(
            input_ids=ids, position_ids=positions(stock, prompt, length), **pixels, **outputs
        )


def generate_masked(stock, prompt: dict, keep: list[list[bool]]) -> list[int]:
    completion = torch.empty(0, dtype=torch.long)
    for _ in range(NEW_TOKENS):
        logits = run_masked(stock, prompt, keep, completion).logits[0, -1]
        completion = torch.cat([completion, logits.argmax(-1, keepdim=True)])
    return completion.tolist()


def highest(scores: list[float], number: int) -> list[bool]:
    best = sorted(range(len(scores)), key=lambda token: (-scores[token], token))[:number]
    return [token in best for token in range(len(scores))]


def last_token_scores(eager_stock, prompt: dict, keep: list[list[bool]], layer: int) -> list[float]:
    """How the prompt's last token attends to the visual ones, from the stock model's matrices."""
    none = torch.empty(0, dtype=torch.long)
    outputs = run_masked(eager_stock, prompt, keep, none, output_attentions=True)
    average = outputs.attentions[layer][0].mean(0)[-1].tolist()
    return [average[place] for place in visual_positions(eager_stock, prompt)]


def stages_slowly(eager_stock, prompt: dict, stages: dict[int, float]) -> list[list[bool]]:
    total = len(visual_positions(eager_stock, prompt))
    keep = [[True] * total for _ in range(LAYERS)]
    for layer, share in stages.items():
        scores = last_token_scores(eager_stock, prompt, keep, layer)
        alive = [score if kept else -1.0 for score, kept in zip(scores, keep[layer], strict=True)]
        kept = highest(alive, max(1, int(share * total)))
        for later in range(layer + 1, LAYERS):
            keep[later] = kept
    return keep


@pytest.mark.parametrize(
    ("method", "stages"),
    [
        (FastV(ratio=RATIO), {1: RATIO}),
        (FastV(ratio=RATIO, full_layers=4), {3: RATIO}),
        (PyramidDrop(ratio=0.216), {1: 0.6, 2: 0.36, 4: 0.216}),
    ],
)
def test_staged_drops_rank_by_the_last_token(models, eager_stock, batch, method, stages):
    tokens, kept, counts = answer(models, batch, method)
    for row, prompt in enumerate(batch.rows):
        expected = stages_slowly(eager_stock, prompt, stages)
        assert kept[row].tolist() == expected
        assert counts[row].tolist() == [sum(layer) for layer in expected]
        assert tokens[row].tolist() == generate_masked(models.stock, prompt, expected)


def test_raw_attention_of_the_last_token(models, eager_stock, batch):
    tokens, kept, counts = answer(models, batch, RawLastToken(ratio=RATIO))
    for row, prompt in enumerate(batch.rows):
        total = batch.visual_counts[row]
        everything = [[True] * total] * LAYERS
        scores = last_token_scores(eager_stock, prompt, everything, K)
        expected = torch.tensor(highest(scores, int(RATIO * total)))
        assert kept[row][0].equal(expected)
        assert tokens[row].equal(generate_hidden(models.stock, prompt, expected, K, NEW_TOKENS))
        number = int(expected.sum())
        assert counts[row].tolist() == [total] * (K + 1) + [number] * (LAYERS - K - 1)


def test_raw_attention_of_the_glimpse_token(models, batch):
    """The reference is what the predictor is given: log-probabilities over all of the prompt."""
    given = []
    handle = models.pruned.model.glimpse.predictor.register_forward_pre_hook(
        lambda module, args: given.append(args[0])
    )
    _, kept, _ = answer(models, batch, RawGlimpseToken(ratio=RATIO))
    handle.remove()
    for row, attention in enumerate(batch.split(given[0])):
        scores = [sum(math.exp(value) for value in token) for token in attention.tolist()]
        assert kept[row][0].tolist() == highest(scores, int(RATIO * len(scores)))
    own = models.pruned.glimpse(**batch.inputs, prune_threshold=0.0, max_keep_ratio=RATIO)
    assert not own.keep_mask.equal(torch.cat([row[0] for row in kept]))  # not the predictor's


@pytest.mark.parametrize("place", [BeforeDecoder, AtGlimpseLayer])
def test_scorers_drop_where_they_should(models, batch, place):
    scorer = RandomTokens(seed=5)
    tokens, kept, counts = answer(models, batch, place("random", RATIO, scorer=scorer))
    for row, prompt in enumerate(batch.rows):
        total = batch.visual_counts[row]
        mask = kept[row][0]
        assert int(mask.sum()) == int(RATIO * total)
        if place is BeforeDecoder:
            expected = generate_masked(models.stock, prompt, [mask.tolist()] * LAYERS)
            assert counts[row].tolist() == [int(mask.sum())] * LAYERS
        else:
            expected = generate_hidden(models.stock, prompt, mask, K, NEW_TOKENS).tolist()
        assert tokens[row].tolist() == expected


def test_dropping_before_the_decoder_equals_removing(models, batch):
    """Masked tokens have no influence: the prompt without them gives the same logits."""
    prompt, row = batch.rows[0], 0
    _, kept, _ = answer(models, batch, BeforeDecoder("random", RATIO, scorer=RandomTokens()))
    mask, stock = kept[row][0], models.stock
    visual = visual_positions(stock, prompt)
    gone = {place for place, keeps in zip(visual, mask.tolist(), strict=True) if not keeps}
    left = [place for place in range(prompt["input_ids"].shape[1]) if place not in gone]
    captured = {}
    handle = stock.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: captured.update(kwargs), with_kwargs=True
    )
    masked = run_masked(stock, prompt, [mask.tolist()] * LAYERS, torch.empty(0, dtype=torch.long))
    handle.remove()
    with torch.no_grad():
        short = stock.model.language_model(
            inputs_embeds=captured["inputs_embeds"][:, left],
            position_ids=positions(stock, prompt, prompt["input_ids"].shape[1])[..., left],
        ).last_hidden_state
    torch.testing.assert_close(stock.lm_head(short)[0, -1], masked.logits[0, -1])


def prompt_tokens(embeddings: torch.Tensor, budget: int, grid=(1, 1), number=0) -> PromptTokens:
    height, width = grid
    cells = [(0, y, x, 1, height, width) for y in range(height) for x in range(width)]
    evidence = torch.zeros(len(embeddings), dtype=torch.bool)
    return PromptTokens(embeddings, torch.tensor(cells), evidence, number, budget)


@pytest.mark.parametrize(("total", "number"), [(12, 1), (12, 5), (9, 9), (1, 1)])
def test_divprune_chooses_greedily(total, number):
    embeddings = torch.randn(total, 6, generator=torch.Generator().manual_seed(total))

    def distance(first: int, second: int) -> float:
        return 1 - torch.cosine_similarity(embeddings[first], embeddings[second], dim=0).item()

    def nearest(token: int, others: list[int]) -> float:
        return min((distance(token, other) for other in others if other != token), default=0.0)

    chosen = [max(range(total), key=lambda token: nearest(token, list(range(total))))]
    while len(chosen) < number:
        rest = [token for token in range(total) if token not in chosen]
        chosen.append(max(rest, key=lambda token: nearest(token, chosen)))
    assert most_diverse(embeddings, number).tolist() == chosen
    scores = DivPrune().scores(prompt_tokens(embeddings, number))
    assert set(keep_highest(scores, number).nonzero()[:, 0].tolist()) == set(chosen)


def test_divprune_reads_what_the_decoder_takes(models, batch):
    _, kept, _ = answer(models, batch, BeforeDecoder("", RATIO, scorer=DivPrune()))
    with torch.no_grad():
        features = models.stock.model.visual(
            batch.rows[0]["pixel_values"], grid_thw=batch.rows[0]["image_grid_thw"]
        )
    features = getattr(features, "pooler_output", features)
    chosen = most_diverse(features, int(RATIO * len(features)))
    assert kept[0][0].nonzero()[:, 0].tolist() == sorted(chosen.tolist())


def vision_attention_slowly(stock, prompt: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention received by each visual token and its keys, patch by patch, in raster order."""
    vision = stock.model.visual
    block = vision.blocks[stock.config.vision_config.fullatt_block_indexes[-1]].attn
    seen = {}

    def hook(module, args, kwargs):
        seen["states"] = args[0] if args else kwargs["hidden_states"]
        seen["rotary"] = kwargs["position_embeddings"]

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        vision(prompt["pixel_values"], grid_thw=prompt["image_grid_thw"])
        qkv = block.qkv(seen["states"])
    handle.remove()
    patches, heads = len(qkv), block.num_heads
    queries, keys = qkv.view(patches, 3, heads, -1).unbind(1)[:2]
    cosine, sine = seen["rotary"]

    def rotate(vector: torch.Tensor, patch: int) -> torch.Tensor:
        first, second = vector.chunk(2)
        return vector * cosine[patch] + torch.cat([-second, first]) * sine[patch]

    received = [0.0] * patches
    for head in range(heads):
        turned = [rotate(keys[patch, head], patch) for patch in range(patches)]
        for patch in range(patches):
            query = rotate(queries[patch, head], patch)
            logits = torch.stack([query @ key for key in turned]) / math.sqrt(len(query))
            for other, weight in enumerate(logits.softmax(0).tolist()):
                received[other] += weight / heads / patches
    turned = [
        torch.stack([rotate(keys[patch, head], patch) for head in range(heads)]).mean(0)
        for patch in range(patches)
    ]
    merge = stock.config.vision_config.spatial_merge_size**2
    by_place = [
        (sum(received[place : place + merge]), torch.stack(turned[place : place + merge]).mean(0))
        for place in range(0, patches, merge)
    ]
    _, height, width = (prompt["image_grid_thw"][0] // torch.tensor([1, 2, 2])).tolist()
    window = stock.config.vision_config.window_size // 8  # of 4-pixel patches, merged by two
    cells = sorted(
        itertools.product(range(height), range(width)),
        key=lambda cell: (cell[0] // window, cell[1] // window, *cell),
    )
    raster = dict(zip(cells, by_place, strict=True))
    ordered = [raster[cell] for cell in itertools.product(range(height), range(width))]
    return torch.tensor([value for value, _ in ordered]), torch.stack([key for _, key in ordered])


def zip_slowly(received, keys, embeddings, budget: int):
    """Chosen tokens, and the embedding of each."""
    total = len(received)
    contextual = min(budget - round(27 / 32 * budget), total - budget)
    dominant = highest(received.tolist(), budget - contextual)
    chosen = {token: embeddings[token] for token in range(total) if dominant[token]}
    rest = [token for token in range(total) if not dominant[token]]
    if contextual == 0:
        return chosen
    targets = rest[:: len(rest) // contextual][:contextual]
    groups = {target: [embeddings[target]] for target in targets}
    for token in rest:
        if token not in targets:
            likeness = [torch.cosine_similarity(keys[token], keys[t], dim=0) for t in targets]
            groups[targets[int(torch.stack(likeness).argmax())]].append(embeddings[token])
    merged = {target: torch.stack(group).mean(0) for target, group in groups.items()}
    return chosen | merged


@pytest.mark.parametrize(("total", "budget"), [(40, 13), (40, 39), (40, 40), (7, 1), (30, 20)])
def test_visionzip_merges_what_it_does_not_keep(total, budget):
    generator = torch.Generator().manual_seed(total + budget)
    received = torch.rand(total, generator=generator)
    keys, embeddings = torch.randn(2, total, 5, generator=generator)
    keep, merged = zip_tokens(received, keys, embeddings, budget)
    expected = zip_slowly(received, keys, embeddings, budget)
    assert keep.nonzero()[:, 0].tolist() == sorted(expected) and len(expected) == budget
    for token, embedding in expected.items():
        torch.testing.assert_close(merged[token], embedding)


def test_visionzip_reads_the_vision_encoder(models, batch):
    ratio = 0.4
    seen = []
    handle = models.pruned.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    tokens, kept, _ = answer(models, batch, VisionZip(ratio=ratio))
    handle.remove()
    for row, prompt in enumerate(batch.rows):
        received, keys = vision_attention_slowly(models.stock, prompt)
        with torch.no_grad():
            features = models.stock.model.visual(
                prompt["pixel_values"], grid_thw=prompt["image_grid_thw"]
            )
        features = getattr(features, "pooler_output", features)
        expected = zip_slowly(received, keys, features, int(ratio * len(features)))
        assert kept[row][0].nonzero()[:, 0].tolist() == sorted(expected)
        visual = visual_positions(models.stock, prompt)
        gone = {place for token, place in enumerate(visual) if token not in expected}
        left = [place for place in range(prompt["input_ids"].shape[1]) if place not in gone]
        for token, embedding in expected.items():
            from_end = left.index(visual[token]) - len(left)  # what is kept is packed to the right
            torch.testing.assert_close(seen[0][row, from_end], embedding)


def test_uniform_grid_is_spread_evenly():
    assert grid_points(4, 4, 4) == [(1, 1), (1, 3), (3, 1), (3, 3)]
    assert grid_points(2, 6, 3) == [(1, 1), (1, 3), (1, 5)]
    for height, width in itertools.product(range(1, 8), repeat=2):
        for number in range(1, height * width + 1):
            points = grid_points(height, width, number)
            assert len(set(points)) == number
            assert all(0 <= y < height and 0 <= x < width for y, x in points)
            lines = [[x for y, x in points if y == line] for line in sorted({y for y, _ in points})]
            sizes = [len(line) for line in lines]
            assert max(sizes) - min(sizes) <= 1
            for line in lines:
                gaps = [right - left for left, right in itertools.pairwise(line)]
                assert not gaps or max(gaps) - min(gaps) <= 1


def test_uniform_grid_shares_its_budget_among_views():
    views = [(2, 3), (4, 4)]
    cells = [
        (0, y, x, 1, height, width)
        for height, width in views
        for y in range(height)
        for x in range(width)
    ]
    evidence = torch.zeros(22, dtype=torch.bool)
    prompt = PromptTokens(torch.zeros(22, 2), torch.tensor(cells), evidence, 0, 11)
    keep = keep_highest(UniformGrid().scores(prompt), 11)
    assert [int(view.sum()) for view in keep.split([6, 16])] == [3, 8]


def test_random_draws_depend_on_seed_and_question_only():
    def draw(seed: int, number: int) -> list[bool]:
        scores = RandomTokens(seed).scores(prompt_tokens(torch.zeros(30, 2), 10, (5, 6), number))
        return keep_highest(scores, 10).tolist()

    assert draw(0, 7) == draw(0, 7)
    assert draw(0, 7) != draw(1, 7) and draw(0, 7) != draw(0, 8)
    shares = torch.tensor([draw(0, number) for number in range(600)]).float().mean(0)
    assert (shares - 1 / 3).abs().max() < 0.09  # four and a half standard deviations


def test_oracle_keeps_the_boxes(models, batch):
    _, kept, _ = answer(models, batch, OracleEvidence())
    expected = [[y < 2 and x < 2 for x in range(5)] for y in range(4)]  # 40 of 80, 40 of 100
    assert kept[0][0].view(4, 5).tolist() == expected
    assert kept[1][0].all()  # nothing is known, so nothing is dropped


def test_all_tokens_is_the_stock_model(models, batch):
    tokens, _, counts = answer_of_stock(models, batch)
    assert counts.tolist() == [[count] * LAYERS for count in batch.visual_counts]
    for row, prompt in enumerate(batch.rows):
        keep = torch.ones(batch.visual_counts[row], dtype=torch.bool)
        assert tokens[row].equal(generate_hidden(models.stock, prompt, keep, K, NEW_TOKENS))


@torch.no_grad()
def answer_of_stock(models, batch):
    with Method().applied(models.pruned, WHOLE_IMAGE, prepared(batch)) as application:
        generated = models.pruned.generate(
            **batch.inputs, **application.options, max_new_tokens=NEW_TOKENS, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip
    sizes = ModelSizes.of(models.pruned.config)
    counts = application.tokens_by_layer(cache_of(generated), batch.visual_counts, sizes)
    return generated.sequences[:, batch.inputs["input_ids"].shape[1] :], None, counts


def test_hooks_are_gone_afterwards(models, batch):
    before = models.pruned.generate(**batch.inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    scorer = RandomTokens()
    for method in (
        BeforeDecoder("", RATIO, scorer=scorer),
        AtGlimpseLayer("", RATIO, scorer=scorer),
        FastV(ratio=RATIO),
        VisionZip(ratio=RATIO),
        RawGlimpseToken(ratio=RATIO),
        RawLastToken(ratio=RATIO),
    ):
        answer(models, batch, method)
    after = models.pruned.generate(**batch.inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert before.equal(after)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in models.pruned.modules())


@pytest.mark.parametrize("grid", [(8, 8), (12, 12), (13, 10), (4, 9), (1, 30)])
def test_smaller_grids_use_their_budget(grid):
    height, width = grid
    for ratio in (0.111, 0.222, 0.333, 0.9):
        budget = budget_of(height * width, ratio)
        rows, columns = smaller_grid(height, width, budget)
        assert budget * 0.65 <= rows * columns <= budget
        scale = math.sqrt(ratio)
        assert abs(rows - height * scale) <= 1 and rows <= height and columns <= width


def test_resized_images_stay_within_budget():
    _, processor = load_model(TINY_MODEL)
    image = Image.new("RGB", (336, 280), "white")
    smaller = ResizedImage(ratio=0.333).present(Sample(image, "", ""), processor).image
    found = processor.image_processor(images=[smaller], return_tensors="pt")["image_grid_thw"]
    assert 0.7 * 40 < int(found.prod()) // 4 <= 39
    with pytest.raises(ValueError, match="cannot make fewer"):
        ResizedImage(ratio=0.01).present(Sample(image, "", ""), processor)
    assert TextOnly().present(Sample(image, "", ""), processor).image is None
