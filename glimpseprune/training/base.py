"""Loading what stage 1 starts from: a stock model, or a GlimpsePrune repository to go on with."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import logging as transformers_logging

from modeling_glimpseprune.base_weights import GLIMPSE_PREFIX
from modeling_glimpseprune.glimpse import Glimpse
from modeling_glimpseprune.glimpse_fields import GLIMPSE_FIELDS
from modeling_glimpseprune.stock import mismatched_names

from ..families import Family, family_of

ADDITIONS = ("token_additions.", "stale_additions.")
MAY_CHANGE = ("prune_layer", "glimpse_lora_rank", "stale_rank")


def load_for_training(
    source: str,
    glimpse_fields: Mapping[str, object] | None = None,
    bf16: bool = False,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin, torch.dtype]:
    """Load a model whose glimpse weights are to be trained, and its processor.

    On a stock model the glimpse weights are drawn from PyTorch's random state; they and their
    training stay in float32. The base keeps its dtype if it is float32, or bfloat16 in a bfloat16
    training, and is held in float32 otherwise.

    Args:
        source: folder or Hub id of a stock model of a known family, or a GlimpsePrune repository.
        glimpse_fields: the configuration's glimpse fields; of those of a repository only where
            tokens are dropped and the ranks of low-rank additions can change.
        bf16: whether training computes in bfloat16.
        attn_implementation: as `from_pretrained` takes it.

    Returns:
        The model, its processor, and the dtype in which the source holds its weights.

    Raises:
        OSError: when there is no such model.
        ValueError: when it is of no known family, its weights do not fit, or a field cannot be.
    """
    content, _ = PretrainedConfig.get_config_dict(source)
    family = family_of(content, source)
    stock = content["model_type"] == family.base_model_type
    config = _config(source, family, content, glimpse_fields or {}, stock)
    with _errors_only():
        model, loading = family.model_class.from_pretrained(
            source,
            config=config,
            dtype="auto",
            key_mapping=dict(family.base_key_map) if stock else None,
            attn_implementation=attn_implementation,
            output_loading_info=True,
        )
        # Its parts would ask whether to run the repository's code, which is here already.
        processor = family.processor_class.from_pretrained(source, trust_remote_code=False)
    additions = tuple(GLIMPSE_PREFIX + name for name in ADDITIONS)
    _check_loading(source, loading, GLIMPSE_PREFIX if stock else additions)
    fresh_additions = not stock and loading["missing_keys"]
    if fresh_additions:  # they start at zero, so what was trained still is
        model.model.glimpse.trained.fill_(True)
    stored_dtype = model.dtype
    if stored_dtype != torch.bfloat16 or not bf16:
        model.float()
    model.model.glimpse.float()
    return model, processor, stored_dtype


def late_backbone(source: str, model: PreTrainedModel) -> PreTrainedModel:
    """The backbone of a repository, over another model's vision encoder and decoder.

    Args:
        source: a GlimpsePrune repository whose glimpse is read where tokens are dropped.
        model: whose weights it shares, but for the glimpse.

    Raises:
        ValueError: when the repository's glimpse is untrained or looks ahead itself, or its base
            differs from the model's in a configuration field.
    """
    late, _, _ = load_for_training(source)
    if not late.model.glimpse.trained:
        raise ValueError(f"the glimpse of {source} is not trained, so nothing can start from it")
    if late.config.prune_layer not in (None, late.config.glimpse_layer):
        raise ValueError(f"late_glimpse needs a glimpse that is read late; {source} looks ahead")
    for part in ("text_config", "vision_config"):
        theirs, ours = (getattr(each.config, part).to_dict() for each in (late, model))
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "depth"):
            if theirs.get(name) != ours.get(name):
                raise ValueError(
                    f"late_glimpse: the base of {source} has {part}.{name} {theirs.get(name)}, "
                    f"the model's has {ours.get(name)}"
                )
    backbone = late.model
    for name, module in model.model.named_children():
        if name != "glimpse":
            setattr(backbone, name, module)
    return backbone.requires_grad_(False).eval()


@torch.no_grad()
def start_glimpse_from(model: PreTrainedModel, late: Glimpse) -> None:
    """Let fresh glimpse weights start as those of a late glimpse; additions stay at zero.

    Raises:
        ValueError: when they are of another shape.
    """
    own = model.model.glimpse
    given = late.state_dict()
    lacking = {name for name in own.state_dict() if not name.startswith(ADDITIONS)} ^ set(given)
    if lacking:
        raise ValueError(f"late_glimpse: its weights differ from the model's: {sorted(lacking)}")
    try:
        own.load_state_dict(given, strict=False)
    except RuntimeError as error:
        raise ValueError(f"late_glimpse: its weights do not fit: {error}") from None


@torch.no_grad()
def start_glimpse_as(model: PreTrainedModel, processor: ProcessorMixin, text: str) -> None:
    """Let fresh glimpse tokens enter the decoder as the mean embedding of a text's tokens.

    A token the decoder knows moves within its reach from the first step on, where a random vector
    of another scale drowns what the frozen layers add to it.

    Raises:
        ValueError: when the text is empty or the model has no glimpse token with an RMS norm.
    """
    token = model.model.glimpse.token
    token_ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    if token is None or model.config.glimpse_norm != "rms_norm" or not token_ids:
        raise ValueError(
            f"start_text needs tokens, a glimpse token and the norm rms_norm, got {text!r}"
        )
    embedding = model.get_input_embeddings().weight[token_ids].float().mean(0)
    token.projection.weight.copy_(torch.eye(len(embedding)))
    token.projection.bias.zero_()
    token.embeddings[0] = embedding
    token.norm.weight.fill_((embedding.square().mean() + token.norm.eps).sqrt().item())


def _config(
    source: str, family: Family, content: dict, glimpse_fields: Mapping[str, object], stock: bool
) -> PretrainedConfig:
    unknown = set(glimpse_fields) - set(GLIMPSE_FIELDS)
    if unknown:
        raise ValueError(f"glimpse: unknown field {sorted(unknown)[0]}")
    if not stock:
        config = family.config_class.from_pretrained(source)
        for name, value in glimpse_fields.items():
            if name in MAY_CHANGE:
                setattr(config, name, value)
            elif value != getattr(config, name):
                raise ValueError(
                    f"glimpse: {name} is {getattr(config, name)} in {source}, which is trained on, "
                    f"and cannot become {value}"
                )
        config.validate_glimpse_fields()
        return config
    own = ("model_type", "architectures", "auto_map", "transformers_version")
    inherited = {name: value for name, value in content.items() if name not in own}
    return family.config_class(**inherited, **glimpse_fields)


def _check_loading(source: str, loading: dict, may_miss: str | tuple[str, ...]) -> None:
    """Refuse a checkpoint whose tensors are not exactly the model's, fresh ones apart."""
    missing = [name for name in loading["missing_keys"] if not name.startswith(may_miss)]
    faults = {"missing": missing, "unexpected": list(loading["unexpected_keys"])}
    faults["of a wrong shape"] = mismatched_names(loading)
    sentences = [
        f"{kind}: {', '.join(sorted(names)[:8])}" for kind, names in faults.items() if names
    ]
    if sentences:
        raise ValueError(f"the weights of {source} do not fit; {'; '.join(sentences)}")


@contextmanager
def _errors_only() -> Iterator[None]:
    """Keep transformers from warning that the glimpse weights are new."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
