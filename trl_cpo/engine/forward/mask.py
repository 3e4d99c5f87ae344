"""What a token of a packed row sees: the masks for attention that takes one, by kind of layer."""

from dataclasses import dataclass

import torch

from .plan import SHARED, NotPackable, PackingPlan

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


@dataclass(frozen=True)
class LayerKind:
    """How far back one kind of layer sees, counted in positions.

    Attributes:
        window: a query at position p sees keys at positions above p - window; None: all.
        chunk: a query sees keys whose position divided by chunk gives the same whole number; None: all.
    """

    window: int | None = None
    chunk: int | None = None

    def binds(self, longest: int) -> bool:
        """Whether a sequence of this many tokens is long enough for the limit to be felt."""
        return any(limit is not None and longest > limit for limit in (self.window, self.chunk))


def layer_kinds(config) -> dict[str, LayerKind]:
    """The kinds of attention layers that a model's text configuration names.

    Args:
        config: the text configuration of a transformers model.

    Raises:
        NotPackable: a kind of layer that is no attention over a mask (recurrent, convolutional, linear), or a limit
            that the configuration does not give.
    """
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    chunk = getattr(config, "attention_chunk_size", None)
    named = getattr(config, "layer_types", None)
    if not named:
        return {FULL: LayerKind()} if window is None else {SLIDING: LayerKind(window=window)}
    kinds: dict[str, LayerKind] = {}
    for name in dict.fromkeys(named):
        if name == FULL:
            kinds[name] = LayerKind()
        elif name == SLIDING and isinstance(window, int):
            kinds[name] = LayerKind(window=window)
        elif name == CHUNKED and isinstance(chunk, int):
            kinds[name] = LayerKind(chunk=chunk)
        else:
            raise NotPackable(f"the model has layers of kind {name!r}, which no tree mask describes")
    return kinds


def rope_follows_length(config) -> bool:
    """Whether a model's rotary frequencies depend on the longest position of a call (dynamic and LongRoPE scaling).

    Padding then has a say in the padded path, where the batch is padded beyond its longest row.
    """
    settings = getattr(config, "rope_parameters", None) or {}
    # One set of parameters, or one for each kind of layer.
    nested = [value for value in settings.values() if isinstance(value, dict)]
    return any(value.get("rope_type") in ("dynamic", "longrope") for value in [settings, *nested])


def visible(plan: PackingPlan, kind: LayerKind, device: torch.device | str = "cpu") -> torch.Tensor:
    """Which keys each query of the packed rows sees: (R, 1, L, L) bool, queries by keys.

        k ≤ q,  same pair,  branch(k) ∈ {shared, branch(q)},  position(k) > position(q) - window

    Filling sees itself only, so that its softmax is defined; nothing sees filling.
    """
    pair, branch, position = (t.to(device) for t in (plan.pair, plan.branch, plan.position_ids))
    places = torch.arange(plan.shape[1], device=device)
    seen = (places[:, None] >= places[None, :]) & (pair[:, :, None] == pair[:, None, :]) & (pair[:, None, :] >= 0)
    seen &= (branch[:, None, :] == SHARED) | (branch[:, :, None] == branch[:, None, :])
    if kind.window is not None:
        seen &= position[:, None, :] > position[:, :, None] - kind.window
    if kind.chunk is not None:
        seen &= position[:, None, :] // kind.chunk == position[:, :, None] // kind.chunk
    seen |= (pair < 0)[:, :, None] & (places[:, None] == places[None, :])
    return seen[:, None]


def dense_masks(
    plan: PackingPlan, kinds: dict[str, LayerKind], additive: torch.dtype | None, device: torch.device | str
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The masks of a packed batch in the form a model takes them: one tensor, or a dict by kind of layer.

    Args:
        plan: the packed rows.
        kinds: the model's kinds of layers.
        additive: None for a bool mask; else the dtype of a mask that is added to the scores, 0 where a key is seen.
        device: where the masks go.
    """
    built: dict[LayerKind, torch.Tensor] = {}
    masks = {}
    for name, kind in kinds.items():
        # A limit that no sequence of this batch reaches leaves the full mask, built once for all kinds.
        kind = kind if kind.binds(plan.longest) else LayerKind()
        if kind not in built:
            mask = visible(plan, kind, device)
            if additive is not None:
                lowest = torch.finfo(additive).min
                mask = torch.zeros(mask.shape, dtype=additive, device=device).masked_fill_(~mask, lowest)
            built[kind] = mask
        masks[name] = built[kind]
    # With one kind of layer a model takes a tensor; models that tell kinds apart take the dict.
    return next(iter(masks.values())) if len(masks) == 1 else masks
