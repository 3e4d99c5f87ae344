"""The packed forward: called like the model by TRL's DPO loss, and returning outputs in TRL's layout."""

import dataclasses
import logging
import weakref

import torch

from .backends import DENSE, back_end, switch, takes
from .mask import dense_masks, layer_kinds, rope_follows_length
from .plan import BatchPlans, NotPackable, PackingPlan, plan_pairs
from .repack import backbone_of, packed_backbone, unwrap
from .segments import segment_masks

logger = logging.getLogger(__name__)

# Reasons already logged per model, so that each is logged once, however many adapters wrap the model.
_LOGGED: weakref.WeakKeyDictionary[torch.nn.Module, set[str]] = weakref.WeakKeyDictionary()

_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_KNOWN = frozenset(
    ["input_ids", "attention_mask", "labels", "use_cache", "fused_lm_head", "output_router_logits", "num_items_in_batch"]
)


class PackedPairForward:
    """A model's forward over pairs that computes each pair's common prefix once, and no padding.

    Takes a batch from TRL's collator, rows [chosen; rejected], and calls the model once. Returns its `FusedCausalLMOutput`
    with every field as in the padded call, (2B, T-1) per token, including gradients. Correct for models that `probe`
    accepts; `packed_forward` combines the two.

    Args:
        model: causal language model with TRL's fused head, bare or wrapped (PEFT, DDP, DeepSpeed, FSDP).
        attention: a back end of `backends`: "varlen" (one call a layer), "segments" (two calls a pair), both for models on
            sdpa, or "dense" (tree mask).
        row_length: places in a packed row with dense masks; None: the length of the longest pair.
        max_length: longest sequence for which packing is known to be correct; a batch with a longer one runs padded.
            None: any length.
        required: raise an error if a batch cannot be packed, instead of running it padded.
        told: reasons for a padded batch that were logged and are not logged again; None: those logged for this model.
        plans: plans of the batch that is run, made before or by another model's forward; a missing one is added.

    Attributes:
        last_plan: how the last batch was packed; None if it ran padded.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        attention: str = DENSE,
        row_length: int | None = None,
        max_length: int | None = None,
        required: bool = False,
        told: set[str] | None = None,
        plans: BatchPlans | None = None,
    ):
        self._one_row = back_end(attention).one_row
        self.model = model
        self.attention = attention
        self.row_length = row_length
        self.max_length = max_length
        self.required = required
        self._plans = plans
        self.last_plan: PackingPlan | None = None
        self._inner = unwrap(model)
        self._told = _LOGGED.setdefault(self._inner, set()) if told is None else told
        self._config = self._inner.config.get_text_config()
        self._kinds = layer_kinds(self._config)
        switch(self._inner, attention)

    def around(self, model: torch.nn.Module) -> "PackedPairForward":
        """The same forward for another wrapper of the model, or for a reference of the same architecture."""
        return PackedPairForward(
            model,
            attention=self.attention,
            row_length=self.row_length,
            max_length=self.max_length,
            required=self.required,
            told=self._told,
        )

    def __call__(self, **inputs):
        """Runs the batch packed, or padded if it cannot be packed.

        Args:
            **inputs: the arguments that TRL's loss passes to a model: input_ids, attention_mask and labels, all (2B, T),
                `use_cache`, `fused_lm_head=True`, and `output_router_logits` for mixtures of experts.

        Raises:
            NotPackable: the batch cannot be packed and packing is required.
        """
        try:
            plan = self._plan(inputs)
        except NotPackable as reason:
            if self.required:
                raise
            self._log_once(str(reason))
            self.last_plan = None
            return self.model(**inputs)
        self.last_plan = plan
        return self._run(plan, inputs)

    def _plan(self, inputs: dict) -> PackingPlan:
        if not takes(self._inner, self.attention):
            given = self._inner.config._attn_implementation
            raise NotPackable(f"the model is on attention {given!r}, which {self.attention} attention does not replace")
        unknown = sorted(name for name in inputs.keys() - _KNOWN if inputs[name] is not None)
        if unknown:
            raise NotPackable(f"the batch carries {', '.join(unknown)}, which cannot be packed")
        if not inputs.get("fused_lm_head") or inputs.get("labels") is None:
            raise NotPackable("the call is not TRL's fused head with labels")
        if self._inner.training and getattr(self._inner.get_input_embeddings(), "neftune_noise_alpha", None):
            raise NotPackable("NEFTune scales its noise with the length of the row")
        plan = self._planned(inputs, row_length=self.row_length, one_row=self._one_row)
        if self.max_length is not None and plan.longest > self.max_length:
            # Without the batch's length, so that the reason is logged once and not for every length.
            raise NotPackable(f"a sequence is longer than the {self.max_length} tokens probed")
        if inputs["input_ids"].size(1) != plan.longest and rope_follows_length(self._config):
            raise NotPackable("the model's rotary frequencies depend on the padded length, and no row is that long")
        return plan

    def _planned(self, inputs: dict, **rows) -> PackingPlan:
        batch = inputs["input_ids"]
        plan = None if self._plans is None else self._plans.get(batch.shape, **rows)
        if plan is None:
            plan = plan_pairs(batch, inputs.get("attention_mask"), inputs["labels"], **rows)
            if self._plans is not None:
                self._plans.add(plan, **rows)
        return plan

    def _run(self, plan: PackingPlan, inputs: dict, mask_plan: PackingPlan | None = None):
        """Runs a planned batch. The probe passes another plan for the mask, to measure the effect of a mistake."""
        device = inputs["input_ids"].device
        call = {name: value for name, value in inputs.items() if name != "labels"}
        with packed_backbone(backbone_of(self.model), plan, self._masks(mask_plan or plan, device)):
            outputs = self.model(**call, shift_labels=plan.on(device).labels[None])
        fields = {name: _spread(value, plan) for name in _PER_TOKEN if (value := getattr(outputs, name)) is not None}
        return dataclasses.replace(outputs, **fields, label_mask=inputs["labels"][:, 1:] != -100)

    def _masks(self, plan: PackingPlan, device: torch.device) -> torch.Tensor | dict[str, torch.Tensor]:
        if self._one_row:
            return plan.keep(tuple(self._kinds.items()), lambda: segment_masks(plan, self._kinds))
        # Eager attention adds its mask to the scores; sdpa takes a bool mask.
        additive = self._inner.dtype if self._config._attn_implementation == "eager" else None
        return dense_masks(plan, self._kinds, additive, device)

    def _log_once(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            logger.warning("Batch run padded, without prefix sharing: %s.", reason)


def _spread(values: torch.Tensor, plan: PackingPlan) -> torch.Tensor:
    """Places values (1, N) at the scored tokens in TRL's layout (2B, T-1), with zeros elsewhere."""
    if not len(plan.target):
        # Zeros with a graph, so that backward() works.
        return (values * 0).sum().to(values.dtype).expand(plan.output_shape)
    rows, columns = plan.output_shape
    flat = values.new_zeros(rows * columns).scatter(0, plan.on(values.device).target, values[0])
    return flat.view(rows, columns)
