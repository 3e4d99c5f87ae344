"""Chooses each model's forward: packed if the probe finds it correct, else the model itself."""

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from ..._trl.datasets import ColumnsBeside
from ..processes import agreed_refusal
from .adapter import PackedPairForward
from .backends import given_attention
from .plan import BatchPlans, NotPackable
from .probing.probe import Verdict, probe
from .repack import unwrap

logger = logging.getLogger(__name__)

#: Where a collated batch holds its plans.
PLANS = "packing_plans"


class PlansBeside(ColumnsBeside):
    """A collator that also makes the packing plans of a batch: in the workers, where the loader has some."""

    def __init__(self, collator: Any):
        super().__init__(collator, ())

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        return {**batch, PLANS: BatchPlans.of(batch)}


class PrefixSharing:
    """The forwards of policy and reference; each model is probed once, at its first use.

    Args:
        wanted: False: always padded; True: refuse models that cannot be packed; None: pack those that can be.
        max_length: longest sequence to expect; None: unknown.
        verbose: whether this process logs the choice.
        compiled: whether the models will be compiled: all pairs run padded then, and the log says so once.
        autocast: gives the context that the models' forwards will run in, for the probe.
    """

    def __init__(
        self,
        wanted: bool | None,
        max_length: int | None,
        verbose: bool = True,
        compiled: bool = False,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        #: False: nothing is packed.
        self.wanted = False if compiled else wanted
        self.max_length = max_length
        self.verbose = verbose
        self._autocast = autocast
        if compiled and wanted is not False and verbose:
            logger.warning(
                "torch_compile=True: pairs run padded, without prefix sharing. Packed rows would be compiled anew for nearly "
                "every batch, until torch gives up. Leave torch_compile out to pack, which saves more."
            )
        self._plans: BatchPlans | None = None  # of the batch that is run now
        # Keyed by the innermost model: evaluation passes it bare, training wrapped. Weakly, so that a reference can be freed
        # once its log-probabilities are precomputed.
        self._known: weakref.WeakKeyDictionary[torch.nn.Module, Verdict] = weakref.WeakKeyDictionary()
        # Policy and reference see the same batches: what is said of one is not said again of the other.
        self._told: set[str] = set()
        # The attention each was probed with: `model.set_attn_implementation` may change it at any time.
        self._probed_with: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()

    @contextmanager
    def batch(self, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Within the block all models run this batch, and share its plan. Gives the batch as models take it."""
        before = self._plans
        self._plans = inputs.get(PLANS) or before or BatchPlans()
        try:
            yield {name: value for name, value in inputs.items() if name != PLANS}
        finally:
            self._plans = before

    def of(self, model: torch.nn.Module) -> Callable:
        """The forward to call in place of `model`.

        Raises:
            NotPackable: packing was asked for, and the model cannot be packed.
        """
        if self.wanted is False:
            return model
        verdict = self.verdict(model)
        if not verdict.ok:
            return model
        return PackedPairForward(
            model,
            attention=verdict.attention,
            max_length=verdict.max_length,
            required=bool(self.wanted),
            told=self._told,
            plans=self._plans,
        )

    def verdict(self, model: torch.nn.Module) -> Verdict:
        """The probe's verdict on `model` with its current attention; probes it if needed, on all processes together.

        Raises:
            NotPackable: packing was asked for, and the model cannot be packed.
        """
        inner = unwrap(model)
        attention = given_attention(inner)
        if self._probed_with.get(inner) != attention:
            with self._autocast():
                verdict = probe(model, max_length=self.max_length, agree=agreed_refusal)
            if not verdict.ok and self.wanted:
                raise NotPackable(
                    f"prefix_sharing=True does not work with {type(inner).__name__}: {verdict.reason}. Leave "
                    "prefix_sharing unset to train it padded."
                )
            if self.verbose:
                logger.log(logging.INFO if verdict.ok else logging.WARNING, "%s: %s", type(inner).__name__, verdict)
                for note in verdict.notes:
                    logger.warning("%s: %s", type(inner).__name__, note)
            self._known[inner], self._probed_with[inner] = verdict, attention
        return self._known[inner]
