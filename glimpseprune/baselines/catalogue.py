"""The methods that a report compares."""

from .divprune import DivPrune
from .fastv import FastV
from .method import Method, OwnPruning, TextOnly
from .oracle_evidence import OracleEvidence
from .pyramiddrop import PyramidDrop
from .random_tokens import RandomTokens
from .raw_attention import RawGlimpseToken, RawLastToken
from .resized_image import ResizedImage
from .scorer import AtGlimpseLayer, BeforeDecoder
from .uniform_grid import UniformGrid
from .visionzip import VisionZip

RATIOS = (0.111, 0.222, 0.333)  # the paper's bound, one visual token in nine, and its multiples


def compared_methods(
    ratios: tuple[float, ...] = RATIOS, seeds: tuple[int, ...] = (0, 1, 2)
) -> list[Method]:
    """Every method at every ratio; those that know none once."""
    methods = [Method(), TextOnly(), OracleEvidence(), OwnPruning()]
    for ratio in ratios:
        methods += [
            OwnPruning("GlimpsePrune, capped", ratio),
            RawGlimpseToken(ratio=ratio),
            RawLastToken(ratio=ratio),
            FastV(ratio=ratio),
            PyramidDrop(ratio=ratio),
            VisionZip(ratio=ratio),
            BeforeDecoder("DivPrune-like", ratio, scorer=DivPrune()),
            ResizedImage(ratio=ratio),
            AtGlimpseLayer("uniform grid, at layer K", ratio, scorer=UniformGrid()),
            BeforeDecoder("uniform grid, before the decoder", ratio, scorer=UniformGrid()),
        ]
        for seed in seeds:
            drawn = RandomTokens(seed)
            at_layer = AtGlimpseLayer("random, at layer K", ratio, seed, drawn)
            before = BeforeDecoder("random, before the decoder", ratio, seed, drawn)
            methods += [at_layer, before]
    return methods


def read_ahead(prune_layer: int, ratios: tuple[float, ...] = RATIOS) -> list[Method]:
    """The model's own glimpse read ahead from a layer, at every ratio.

    Its thresholds were chosen for other scores, so as many tokens are kept as the ratio allows.
    """
    name = f"GlimpsePrune, read ahead from {prune_layer}"
    settings = {"prune_threshold": 0.0, "prune_layer": prune_layer}
    return [OwnPruning(name, ratio, **settings) for ratio in ratios]


def without_redundant_patches(tolerance: float, ratios: tuple[float, ...] = ()) -> list[Method]:
    """The model's own pruning over what redundant patches leave, without a bound and within some.

    Args:
        tolerance: in grey levels.
    """
    name = f"GlimpsePrune, redundant patches left out ({tolerance:g})"
    return [OwnPruning(name, ratio, redundant_patches=tolerance) for ratio in (None, *ratios)]


def own_pruning(name: str, ratios: tuple[float, ...]) -> list[Method]:
    """A model's own pruning, as it is configured and within every ratio."""
    return [OwnPruning(name), *(OwnPruning(f"{name}, capped", ratio) for ratio in ratios)]


def label(method: Method) -> str:
    """A method's name with its ratio, as in a line of a table."""
    return method.name if method.ratio is None else f"{method.name}, {method.ratio:.1%}"
