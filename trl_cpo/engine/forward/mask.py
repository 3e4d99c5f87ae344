"""Attention masks for packed rows, by kind of layer."""

from dataclasses import dataclass

import torch

from .plan import SHARED, NotPackable, PackingPlan

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


@dataclass(frozen=True)
class LayerKind:
    """How far back one kind of attention layer sees, in positions.

    Attributes:
        window: a query at position p sees keys at positions above p - window; None: all.
        chunk: a query at position p sees keys in the same chunk, position // chunk == p // chunk; None: all.
    """

    window: int | None = None
    chunk: int | None = None

    def binds(self, longest: int) -> bool:
        """Whether the limit has an effect on a sequence of `longest` tokens."""
        return any(limit is not None and longest > limit for limit in (self.window, self.chunk))


def layer_kinds(config) -> dict[str, LayerKind]:
    """The kinds of attention layers that a model's text configuration names.

    Args:
        config: the text configuration of a transformers model.

    Raises:
        NotPackable: a kind of layer is not masked attention (recurrent, convolutional, linear), or the configuration lacks
            its limit.
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
            raise NotPackable(f"the model has layers of kind {name!r}, for which there is no tree mask")
    return kinds


def rope_follows_length(config) -> bool:
    """Whether a model's rotary frequencies depend on the longest position of a call (dynamic and LongRoPE scaling).

    If so, padding beyond the longest row changes the results of the padded path.
    """
    settings = getattr(config, "rope_parameters", None) or {}
    # One set of parameters, or one for each kind of layer.
    nested = [value for value in settings.values() if isinstance(value, dict)]
    return any(value.get("rope_type") in ("dynamic", "longrope") for value in [settings, *nested])


def visible(plan: PackingPlan, kind: LayerKind, device: torch.device | str = "cpu") -> torch.Tensor:
    """The keys that each query of the packed rows sees: (R, 1, L, L) bool, queries by keys.

        k ≤ q,  same pair,  branch(k) ∈ {shared, branch(q)},  position(k) > position(q) - window

    A filling place sees only itself, so that its softmax is defined; no other place sees it.
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
    """The masks of a packed batch as a model takes them: one tensor, or a dict by kind of layer.

    Args:
        plan: the packed rows.
        kinds: the model's kinds of layers.
        additive: None for a bool mask; else the dtype of a mask added to the scores, 0 where a key is seen.
        device: device of the masks.
    """
    built: dict[LayerKind, torch.Tensor] = {}
    masks = {}
    for name, kind in kinds.items():
        # If no sequence of this batch reaches the limit, the full mask applies; it is built once for all kinds.
        kind = kind if kind.binds(plan.longest) else LayerKind()
        if kind not in built:
            mask = visible(plan, kind, device)
            if additive is not None:
                lowest = torch.finfo(additive).min
                mask = torch.zeros(mask.shape, dtype=additive, device=device).masked_fill_(~mask, lowest)
            built[kind] = mask
        masks[name] = built[kind]
    # A model with one kind of layer takes a tensor; one with several takes the dict.
    return next(iter(masks.values())) if len(masks) == 1 else masks
