"""The visual importance predictor (VIP; paper, section 3.2).

It turns the glimpse token's attention to each visual token, one number a head, into one importance
logit a token. Each of its layers attends within one image at a time, so memory stays linear in the
tokens; queries and keys see one tapped vision feature map, values see the hidden state alone.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

ROTARY_BASE = 10_000.0
NORM_EPS = 1e-6


class RMSNorm(nn.Module):
    """Root-mean-square norm computed in float32, as the decoders of the supported families do."""

    def __init__(self, size: int, eps: float = NORM_EPS):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        scaled = hidden_states.float()
        scaled = scaled * torch.rsqrt(scaled.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(hidden_states.dtype)


class PredictorAttention(nn.Module):
    """Self-attention within token groups, under 2-D rotary positions.

    Queries and keys are projected from `[hidden, condition]`, values and output from the hidden
    state alone; the projections have no bias.
    """

    def __init__(self, hidden_size: int, condition_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        joint_size = hidden_size + condition_size
        self.q_proj = nn.Linear(joint_size, joint_size, bias=False)
        self.k_proj = nn.Linear(joint_size, joint_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        condition: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor],
        groups: list["TokenGroup"],
    ) -> torch.Tensor:
        """`hidden_states (N, hidden)`, `condition (N, condition)` -> `(N, hidden)`."""
        joint = hidden_states
        if condition is not None:
            joint = torch.cat([hidden_states, condition], dim=-1)
        query = rotate(self._split_heads(self.q_proj(joint)), *rotary)  # (N, heads, joint / heads)
        key = rotate(self._split_heads(self.k_proj(joint)), *rotary)
        value = self._split_heads(self.v_proj(hidden_states))  # (N, heads, hidden / heads)
        return self.o_proj(torch.cat([group.attend(query, key, value) for group in groups]))

    def _split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (self.num_heads, -1))


class PredictorMLP(nn.Module):
    """Gated MLP of twice the width, with biases."""

    def __init__(self, hidden_size: int, activation: str):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, 2 * hidden_size)
        self.up_proj = nn.Linear(hidden_size, 2 * hidden_size)
        self.down_proj = nn.Linear(2 * hidden_size, hidden_size)
        self.activation = ACT2FN[activation]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate = self.activation(self.gate_proj(hidden_states))
        return self.down_proj(gate * self.up_proj(hidden_states))


class PredictorLayer(nn.Module):
    """Pre-norm attention and MLP, each with a residual connection."""

    def __init__(self, config, condition_size: int):
        super().__init__()
        size = config.predictor_hidden_size
        self.attention_norm = RMSNorm(size)
        self.attention = PredictorAttention(size, condition_size, config.predictor_num_heads)
        self.mlp_norm = RMSNorm(size)
        self.mlp = PredictorMLP(size, config.predictor_hidden_act)

    def forward(self, hidden_states, condition, rotary, groups) -> torch.Tensor:
        normalised = self.attention_norm(hidden_states)
        hidden_states = hidden_states + self.attention(normalised, condition, rotary, groups)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class VisualImportancePredictor(nn.Module):
    """Attention of the glimpse token in, importance logits out.

    Args:
        config: a GlimpsePrune configuration.
        num_attention_heads: query heads of the decoder.
        vision_size: width of the tapped vision features.
    """

    def __init__(self, config, num_attention_heads: int, vision_size: int):
        super().__init__()
        size, num_layers = config.predictor_hidden_size, len(config.vision_layers)
        condition_size = config.predictor_condition_size if config.predictor_use_vision else 0
        num_columns = num_attention_heads * len(config.attention_layers)
        self.attention_projection = nn.Linear(num_columns, size)
        self.condition_projections = nn.ModuleList(
            nn.Linear(vision_size, condition_size)
            for _ in range(num_layers if condition_size else 0)
        )
        self.layers = nn.ModuleList(
            PredictorLayer(config, condition_size) for _ in range(num_layers)
        )
        self.output_projection = nn.Linear(size, 1)
        self.rotary_size = config.predictor_query_size // config.predictor_num_heads

    def forward(
        self,
        attention: torch.Tensor,
        conditions: list[torch.Tensor],
        coordinates: torch.Tensor,
        groups: list["TokenGroup"],
    ) -> torch.Tensor:
        """Score visual tokens.

        Args:
            attention: `(N, attention_layers * heads)`, the glimpse token's attention to each of the
                N visual tokens, in prompt order.
            conditions: one `(N, condition_size)` tensor a predictor layer, see `conditions`.
            coordinates: `(N, 2)` integer row and column of each token in its image.
            groups: which tokens attend to one another; together they cover 0..N-1 in order.

        Returns:
            `(N,)` importance logits; higher means more important.
        """
        hidden_states = self.attention_projection(attention)
        rotary = rotary_2d(coordinates, self.rotary_size, hidden_states.dtype)
        for index, layer in enumerate(self.layers):
            condition = conditions[index] if self.condition_projections else None
            hidden_states = layer(hidden_states, condition, rotary, groups)
        return self.output_projection(hidden_states).squeeze(-1)

    def conditions(self, vision_features: list[torch.Tensor]) -> list[torch.Tensor]:
        """What the layers look at beside the hidden states; it does not depend on the question.

        Args:
            vision_features: one `(N, vision_size)` tensor a layer.

        Returns:
            One `(N, condition_size)` tensor a layer; none where the predictor sees no vision.
        """
        of_layers = zip(self.condition_projections, vision_features, strict=False)
        return [project(features) for project, features in of_layers]


class TokenGroup:
    """`count` consecutive images of `size` tokens each, beginning at token `start`."""

    def __init__(self, start: int, size: int, count: int):
        self.start, self.size, self.count = start, size, count

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of each image to itself: `(N, heads, *)` in, `(size * count, width)` out."""
        attended = attend(*(self._per_image(states) for states in (query, key, value)))
        return attended.transpose(1, 2).flatten(2).flatten(0, 1)

    def _per_image(self, states: torch.Tensor) -> torch.Tensor:
        states = states[self.start : self.start + self.size * self.count]
        return states.unflatten(0, (self.count, self.size)).transpose(1, 2)


class WindowedTokenGroup(TokenGroup):
    """One image whose tokens attend within square windows anchored at its top-left corner.

    Args:
        start: index of the image's first token.
        places: `(size, 2)` row and column of each token, on the host.
        window: side of a window in tokens. Windows may be smaller, at the right and bottom edge and
            where tokens are missing.
    """

    def __init__(self, start: int, places: torch.Tensor, window: int):
        super().__init__(start, len(places), 1)
        row, column = places.unbind(1)
        across = int(column.max()) // window + 1
        _, of_token = ((row // window) * across + column // window).unique(return_inverse=True)
        within = (row % window) * window + column % window
        self.windows = torch.full((int(of_token.max()) + 1, window * window), -1)
        self.windows[of_token, within] = torch.arange(len(places))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        windows = self.windows.to(query.device)  # (windows, window ** 2), -1 where outside
        inside = windows >= 0
        states = [states[self.start + windows.clamp(min=0)] for states in (query, key, value)]
        states = [state.transpose(1, 2) for state in states]
        attended = attend(*states, mask=inside[:, None, None, :])
        attended = attended.transpose(1, 2).flatten(2)  # (windows, window ** 2, width)
        gathered = attended.new_empty(self.size, attended.shape[-1])
        gathered[windows[inside]] = attended[inside]
        return gathered


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`scaled_dot_product_attention` for values narrower than queries.

    The kernels with linear memory want equal widths (everywhere but in one CUDA kernel), so values
    are padded with zeros on the way in.
    """
    width = value.shape[-1]
    value = F.pad(value, (0, query.shape[-1] - width))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)[..., :width]


def rotary_2d(
    coordinates: torch.Tensor, size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of 2-D rotary positions.

    Args:
        coordinates: `(N, 2)` rows and columns.
        size: head width, a multiple of 4; one half of the frequencies turns with the row, the other
            with the column.
        dtype: of the result; the angles are computed in float32.

    Returns:
        Two `(N, 1, size)` tensors.
    """
    steps = torch.arange(0, size // 2, 2, device=coordinates.device, dtype=torch.float32)
    frequencies = ROTARY_BASE ** (-steps / (size // 2))
    angles = (coordinates[:, :, None].float() * frequencies).flatten(1)  # (N, size / 2)
    angles = torch.cat([angles, angles], dim=-1)[:, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn `(N, heads, size)` by `(N, 1, size)` angles, pairing each half's i-th elements."""
    first, second = states.chunk(2, dim=-1)
    return states * cosine + torch.cat([-second, first], dim=-1) * sine
