"""Outputs of the official implementation, reproduced from its own checkpoints.

Every case is converted by the conversion script and loaded with our class. The recorded outputs are
not part of the repository: `GLIMPSEPRUNE_GOLDEN_DIR` says where they lie (default: `shared/golden`
beside the repository), and without them these tests are skipped.
"""

import functools
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from conversion.convert_llava_base import convert_base
from conversion.convert_official import convert
from glimpseprune.families import family_of
from glimpseprune.hub.shards import ConversionError
from modeling_glimpseprune.modeling_llava import GlimpsePruneLlavaForConditionalGeneration
from modeling_glimpseprune.stock import cache_of

REPOSITORY = Path(__file__).resolve().parents[1]
GOLDEN = Path(os.environ.get("GLIMPSEPRUNE_GOLDEN_DIR", REPOSITORY.parent / "shared" / "golden"))
FOLDERS = {
    f"{path.parts[-3]}/{path.parts[-2]}": path.parent for path in GOLDEN.glob("*/*/case.json")
}
SCORE_TOLERANCE, LOGIT_TOLERANCE, VECTOR_TOLERANCE = 2e-4, 1e-4, 5e-6
MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "mm_token_type_ids",
    "pixel_values",
    "image_grid_thw",
)
TRANSFORMERS_5 = int(transformers.__version__.partition(".")[0]) >= 5


def read_meta(case: str) -> dict:
    return json.loads((FOLDERS[case] / "case.json").read_text())


def is_ablation(case: str) -> bool:
    """Whether the case uses a setting that is refused."""
    settings = read_meta(case)["gp_config"]
    supervised = settings["deep_supervision"] or settings["ori_attn_supervision"]
    return supervised or settings["attn_fuse_type"] == "AttnFuserDummy"


ABLATIONS = sorted(filter(is_ablation, FOLDERS))
CASES = sorted(set(FOLDERS) - set(ABLATIONS))
BATCHES = [case for case in CASES if len(read_meta(case)["prompts"]) > 1]
ABSENT = pytest.param(None, marks=pytest.mark.skip(reason=f"{GOLDEN} holds no recorded outputs"))


def base_of(case: str) -> Path:
    meta = read_meta(case)
    return FOLDERS[case] / meta.get("base", meta.get("base_hf"))


def every(cases: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases or [ABSENT])


class Sample:
    """What one prompt, or batch of prompts, was given and gave.

    Attributes:
        inputs: recorded inputs by name.
        target: recorded outputs by name.
    """

    def __init__(self, path: Path, pixels: torch.Tensor | None = None):
        tensors = load_file(path)
        self.inputs = {name[3:]: tensors[name] for name in tensors if name.startswith("in.")}
        self.target = {name[4:]: tensors[name] for name in tensors if name.startswith("out.")}
        if pixels is not None:  # a row of a batch: its pixels are a part of the batch's
            start, end = self.inputs["pixel_slice"].tolist()
            self.inputs["pixel_values"] = pixels[start:end]
        if "hf_input_ids" in self.inputs:
            self._as_llava_of_the_hub()
        self.inputs["pixel_values"] = self.inputs["pixel_values"].float()
        self.vocabulary = self.target["prefill_logits_last"].shape[-1]

    def _as_llava_of_the_hub(self) -> None:
        """Prompts with a placeholder for each visual token; outputs of all rows in one list."""
        for name in ("input_ids", "attention_mask"):
            self.inputs[name] = self.inputs.pop(f"hf_{name}")
        self.inputs.setdefault("pixel_values", self.inputs.get("images"))
        self.inputs["image_row"] = torch.arange(len(self.inputs["input_ids"]))
        self.target["attn_map"] = self.target["attn_map"].flatten(0, 1)
        self.target["selected_image_embeds"] = self.target["selected_image_embeds"].flatten(1, 2)

    @property
    def grids(self) -> list[list[int]]:
        if "grid_hw" in self.target:
            return [[1, *self.target["grid_hw"].tolist()]] * len(self.inputs["image_row"])
        return (self.inputs["image_grid_thw"] // torch.tensor([1, 2, 2])).tolist()

    def model_inputs(self) -> dict[str, torch.Tensor]:
        names = [name for name in MODEL_INPUTS if name in self.inputs]
        if not TRANSFORMERS_5:
            names = [name for name in names if name != "mm_token_type_ids"]
        return {name: self.inputs[name] for name in names}


def load_samples(case: str) -> tuple[Sample, list[Sample]]:
    """The case itself, and the rows of a batch run alone (else the case again)."""
    whole = Sample(FOLDERS[case] / "case.safetensors")
    pixels = whole.inputs["pixel_values"]
    files = sorted(FOLDERS[case].glob("row*_alone.safetensors"))
    return whole, [Sample(file, pixels) for file in files] or [whole]


@pytest.fixture(scope="session")
def load_model(tmp_path_factory):
    """Convert a case and load it in float32, once a session."""

    @functools.cache
    def load(case: str):
        output = tmp_path_factory.mktemp("golden") / "model"
        convert(base_of(case), FOLDERS[case], output)
        family = family_of(json.loads((output / "config.json").read_text()), output)
        model = family.model_class.from_pretrained(output, dtype=torch.float32)
        model.generation_config.eos_token_id = None  # as recorded: no token ends a generation
        return model.eval()

    return load


def generate(model, sample: Sample, max_new_tokens: int = 24, **settings):
    """Greedy generation as recorded, with the logits of every step."""
    return model.generate(
        **sample.model_inputs(),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )


def new_tokens(output, sample: Sample) -> list[list[int]]:
    return output.sequences[:, sample.inputs["input_ids"].shape[1] :].tolist()


def step_logits(output, sample: Sample) -> torch.Tensor:
    """`(batch, steps, vocabulary)`; the Hub's LLaVA knows a few words more."""
    return torch.stack(output.logits, dim=1)[..., : sample.vocabulary]


def assert_near(found: torch.Tensor, target: torch.Tensor, tolerance: float) -> None:
    assert found.shape == target.shape
    torch.testing.assert_close(found, target, rtol=0, atol=tolerance)


@every(CASES)
def test_golden_importance_and_keep_mask(load_model, case):
    model = load_model(case)
    whole, rows = load_samples(case)
    for sample in {id(sample): sample for sample in [whole, *rows]}.values():
        record = model.glimpse(**sample.model_inputs())
        assert_near(record.importance, sample.target["image_token_mask_logits"], SCORE_TOLERANCE)
        assert torch.equal(record.keep_mask, sample.target["image_token_keep_mask"])


@every(CASES)
def test_golden_record_by_image(load_model, case):
    sample, _ = load_samples(case)
    record = load_model(case).glimpse(**sample.model_inputs())
    counts = [[visual.kept, visual.total] for visual in record.visuals]
    assert counts == read_meta(case)["kept_per_image"]
    assert [visual.row for visual in record.visuals] == sample.inputs["image_row"].tolist()
    assert [list(visual.grid) for visual in record.visuals] == sample.grids
    assert {visual.kind for visual in record.visuals} == {"image"}
    assert (
        record.retention
        == record.kept / record.total
        == sum(c[0] for c in counts) / sum(c[1] for c in counts)
    )


@every(CASES)
def test_golden_glimpse_inputs(load_model, case):
    """The glimpse vector, the attention read and the vision features tapped."""
    model = load_model(case)
    sample, _ = load_samples(case)
    read = {}
    predictor = model.model.glimpse.predictor
    hook = predictor.register_forward_pre_hook(
        lambda module, inputs: read.update(attention=inputs[0])
    )
    conditions = predictor.conditions
    predictor.conditions = lambda tapped: read.update(tapped=tapped) or conditions(tapped)
    model.glimpse(**sample.model_inputs())
    hook.remove()
    del predictor.conditions
    assert_near(read["attention"], sample.target["attn_map"], SCORE_TOLERANCE)
    features = torch.stack(read["tapped"])
    assert_near(features, sample.target["selected_image_embeds"], SCORE_TOLERANCE)
    if "le_layer0" in sample.target:
        vectors = sample.target["le_layer0"]
        found = model.model.glimpse.token(0)
        assert_near(found.detach().expand_as(vectors), vectors, VECTOR_TOLERANCE)


@every(CASES)
def test_golden_pruned_cache(load_model, case):
    """The keys that are left hold the kept tokens at their own positions."""
    sample, _ = load_samples(case)
    cache = cache_of(generate(load_model(case), sample, max_new_tokens=1))
    lengths = [layer.keys.shape[-2] for layer in cache.layers]
    assert lengths == sample.target["kv_lens_after_prefill"].tolist()
    real = sample.target["reduced_attention_mask"].bool()
    for layer, name in ((0, "kv_key_layer0"), (-1, "kv_key_last_layer")):
        keys, target = cache.layers[layer].keys, sample.target[name]
        assert keys.shape == target.shape  # (batch, heads, reduced length, head width)
        keys, target = (tensor.transpose(1, 2)[real] for tensor in (keys, target))
        assert_near(keys, target, SCORE_TOLERANCE)


@every(CASES)
def test_golden_prefill_logits(load_model, case):
    """Logits of every kept prompt token, in the prompt's full length."""
    sample, _ = load_samples(case)
    with torch.no_grad():
        logits = load_model(case)(**sample.model_inputs()).logits[..., : sample.vocabulary]
    assert_near(logits[:, -1], sample.target["prefill_logits_last"], LOGIT_TOLERANCE)
    kept = sample.target["remain_masks"] & sample.inputs["attention_mask"].bool()
    real = sample.target["reduced_attention_mask"].bool()
    assert_near(logits[kept], sample.target["reduced_logits_all"][real], LOGIT_TOLERANCE)


@every(CASES)
def test_golden_greedy_tokens(load_model, case):
    for sample in load_samples(case)[1]:
        output = generate(load_model(case), sample)
        assert new_tokens(output, sample) == sample.target["generated_ids"].tolist()
        assert_near(step_logits(output, sample), sample.target["step_logits"], LOGIT_TOLERANCE)
        record = cache_of(output).glimpse
        assert torch.equal(record.keep_mask, sample.target["image_token_keep_mask"])


@every(CASES)
def test_golden_unpruned_tokens(load_model, case):
    for sample in load_samples(case)[1]:
        output = generate(load_model(case), sample, prune=False)
        assert new_tokens(output, sample) == sample.target["unpruned_generated_ids"].tolist()
        assert_near(
            step_logits(output, sample), sample.target["unpruned_step_logits"], LOGIT_TOLERANCE
        )


@every(BATCHES)
def test_golden_batch_equals_rows_alone(load_model, case):
    """Recorded tokens of a batch are wrong but in the last row; each row alone is the target."""
    batch, rows = load_samples(case)
    output = generate(load_model(case), batch)
    for row, alone in enumerate(rows):
        assert new_tokens(output, batch)[row] == alone.target["generated_ids"][0].tolist()
        assert_near(
            step_logits(output, batch)[row], alone.target["step_logits"][0], LOGIT_TOLERANCE
        )


@every(ABLATIONS)
def test_golden_ablations_are_refused(case, tmp_path):
    settings = r"(deep_supervision|ori_attn_supervision|attn_fuse_type)=.* is not supported"
    with pytest.raises(ConversionError, match=settings):
        convert(base_of(case), FOLDERS[case], tmp_path / "out")
    assert not list(tmp_path.iterdir())


@every([case for case in CASES if case.startswith("llava/") and case[6] in "abcf"])
def test_golden_from_the_authors_base(case, tmp_path):
    """The base as its authors lay it out, turned into the Hub's layout and converted from there."""
    meta = read_meta(case)
    base = FOLDERS[case] / meta["base_liuhaotian"]
    convert_base(base, base / "clip_tower", tmp_path / "base")
    convert(tmp_path / "base", FOLDERS[case], tmp_path / "out")
    model = GlimpsePruneLlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    model.generation_config.eos_token_id = None
    for sample in load_samples(case)[1]:
        output = generate(model, sample)
        assert new_tokens(output, sample) == sample.target["generated_ids"].tolist()
        record = cache_of(output).glimpse
        assert_near(record.importance, sample.target["image_token_mask_logits"], SCORE_TOLERANCE)
        assert torch.equal(record.keep_mask, sample.target["image_token_keep_mask"])
