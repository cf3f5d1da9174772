"""Loading what stage 1 starts from: a stock model, or a GlimpsePrune repository to go on with."""

from collections.abc import Mapping

import torch
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

from modeling_glimpseprune.base_weights import GLIMPSE_PREFIX
from modeling_glimpseprune.glimpse_fields import GLIMPSE_FIELDS
from modeling_glimpseprune.low_rank import LowRankAddition
from modeling_glimpseprune.stock import mismatched_names

from ..families import Family, family_of
from ..loading import errors_only
from ..tokenizer_files import read_as_filed

CALL_FIELDS = ("prune_layer", "redundant_patches")  # may change where training goes on
RANKS = ("glimpse_lora_rank", "stale_rank")  # may become positive where they are 0


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
        glimpse_fields: the configuration's glimpse fields; of those of a repository only
            `prune_layer` and `redundant_patches` can change, and the ranks of low-rank additions
            that it does not have, which start at zero.
        bf16: whether training computes in bfloat16.
        attn_implementation: as `from_pretrained` takes it.

    Returns:
        The model, its processor, and the dtype in which the source holds its weights.

    Raises:
        OSError: when there is no such model.
        ValueError: when it is of no known family, its weights do not fit, or a field cannot be.
    """
    glimpse_fields = dict(glimpse_fields or {})
    config, family, stock = _config(source, glimpse_fields)
    with errors_only():
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
        if family.tokenizer_as_filed:
            processor.tokenizer = read_as_filed(source)
    _check_loading(source, loading, (GLIMPSE_PREFIX,) if stock else ())
    if not stock:
        _change_fields(model, glimpse_fields)
    stored_dtype = model.dtype
    if stored_dtype != torch.bfloat16 or not bf16:
        model.float()
    model.model.glimpse.float()
    return model, processor, stored_dtype


def config_for_training(source: str, glimpse_fields: Mapping[str, object]) -> PretrainedConfig:
    """The configuration of the model that `load_for_training` makes; no weights are read.

    Raises:
        OSError: when there is no such model.
        ValueError: when it is of no known family, or a field cannot be.
    """
    config, *_ = _config(source, glimpse_fields)
    for name, value in glimpse_fields.items():
        setattr(config, name, value)
    return config


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
    source: str, glimpse_fields: Mapping[str, object]
) -> tuple[PretrainedConfig, Family, bool]:
    """The configuration to load with, its family, and whether the source is a stock model."""
    content, _ = PretrainedConfig.get_config_dict(source)
    family = family_of(content, source)
    stock = content["model_type"] == family.base_model_type
    unknown = set(glimpse_fields) - set(GLIMPSE_FIELDS)
    if unknown:
        raise ValueError(f"glimpse: unknown field {sorted(unknown)[0]}")
    if not stock:
        config = family.config_class.from_pretrained(source)
        for name, value in glimpse_fields.items():
            free = name in CALL_FIELDS or (name in RANKS and getattr(config, name) == 0)
            if not free and value != getattr(config, name):
                raise ValueError(
                    f"glimpse: {name} is {getattr(config, name)} in {source}, which is trained on, "
                    f"and cannot become {value}"
                )
        return config, family, stock
    own = ("model_type", "architectures", "auto_map", "transformers_version")
    inherited = {name: value for name, value in content.items() if name not in own}
    return family.config_class(**inherited, **glimpse_fields), family, stock


@torch.no_grad()
def _change_fields(model: PreTrainedModel, glimpse_fields: Mapping[str, object]) -> None:
    """Change what may change of a loaded model's glimpse, whose trained weights stay.

    Raises:
        ValueError: for a field that cannot be.
    """
    config, glimpse = model.config, model.model.glimpse
    for name in (*CALL_FIELDS, *RANKS):
        if name in glimpse_fields:
            setattr(config, name, glimpse_fields[name])
    config.validate_glimpse_fields()
    held = set(glimpse.modules())
    glimpse.add_low_rank(config)
    for module in glimpse.modules():
        if isinstance(module, LowRankAddition) and module not in held:
            spread = config.get_text_config().initializer_range
            torch.nn.init.normal_(module.down.weight, std=spread)


def _check_loading(source: str, loading: dict, may_miss: tuple[str, ...]) -> None:
    """Refuse a checkpoint whose tensors are not exactly the model's, fresh ones apart."""
    missing = [name for name in loading["missing_keys"] if not name.startswith(may_miss)]
    faults = {"missing": missing, "unexpected": list(loading["unexpected_keys"])}
    faults["of a wrong shape"] = mismatched_names(loading)
    sentences = [
        f"{kind}: {', '.join(sorted(names)[:8])}" for kind, names in faults.items() if names
    ]
    if sentences:
        raise ValueError(f"the weights of {source} do not fit; {'; '.join(sentences)}")
