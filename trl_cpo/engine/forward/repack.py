"""Hooks around the backbone: the padded batch goes in packed, and its hidden states are ordered for the head.

TRL's fused head passes its arguments on to the model's backbone and scores `last_hidden_state` against pre-shifted labels.
For one call, two hooks are added to the backbone. The first replaces the padded batch by the packed one with its mask. The
second selects the states that predict scored tokens, so that the head computes no others. Everything around the backbone
(DDP, DeepSpeed, PEFT, TRL's head) sees an ordinary call.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .plan import PackingPlan


def layers_around(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yields the model and the models it wraps, outermost first: torch (DDP, FSDP, compile), DeepSpeed, PEFT, transformers."""
    while True:
        yield model
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif "module" in model._modules:
            model = model._modules["module"]
        else:
            return


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside all wrappers."""
    *_, innermost = layers_around(model)
    return innermost


def backbone_of(model: torch.nn.Module) -> torch.nn.Module:
    """The part of a causal language model that TRL's fused head calls for hidden states."""
    return unwrap(model).base_model


@contextmanager
def packed_backbone(
    backbone: torch.nn.Module,
    plan: PackingPlan,
    masks: torch.Tensor | dict[str, torch.Tensor],
) -> Iterator[None]:
    """Within the block, calling the backbone with the padded batch runs the packed one.

    The backbone's `last_hidden_state` becomes (1, N, hidden). Router logits, one tensor (R·L, experts) per layer, are mapped
    back to the padded order (2B·T, experts), so that a shared token counts once in each row, as in the padded path.

    Args:
        backbone: the module that TRL's fused head calls.
        plan: the packed rows.
        masks: the attention mask to pass to the backbone.
    """

    def pack(module, args, kwargs):
        if args or kwargs.get("inputs_embeds") is not None:
            raise TypeError("the backbone was called with positional arguments or inputs_embeds; use the padded path")
        input_ids = kwargs["input_ids"]
        indices = plan.on(input_ids.device)
        packed = dict(
            kwargs,
            input_ids=input_ids.reshape(-1)[indices.source],
            attention_mask=masks,
            position_ids=indices.position_ids,
        )
        return (), packed

    def unpack(module, args, output):
        states = output.last_hidden_state
        if states.shape[:2] != plan.shape:
            raise RuntimeError(f"hidden states have shape {tuple(states.shape)}, expected rows {plan.shape}")
        output.last_hidden_state = states.flatten(0, 1).index_select(0, plan.on(states.device).scored)[None]
        routers = output.get("router_logits")
        if routers is not None:
            for router in routers:
                if router.shape[0] != plan.source.numel():
                    raise RuntimeError(f"router logits have shape {tuple(router.shape)} for rows {plan.shape}")
            output.router_logits = tuple(router.index_select(0, plan.home_on(router.device)) for router in routers)
        return output

    hooks = [
        backbone.register_forward_pre_hook(pack, with_kwargs=True),
        backbone.register_forward_hook(unpack),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
