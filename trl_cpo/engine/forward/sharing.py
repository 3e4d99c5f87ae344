"""Chooses each model's forward: packed if the probe finds it correct, else the model itself."""

import logging
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from ..processes import agreed_refusal
from .adapter import PackedPairForward
from .backends import DENSE, given_attention
from .plan import NotPackable
from .probing.probe import Verdict, probe
from .repack import unwrap

logger = logging.getLogger(__name__)


class PrefixSharing:
    """The forwards of policy and reference; each model is probed once, at its first use.

    Args:
        wanted: False: always padded; True: refuse models that cannot be packed; None: pack those that can be.
        max_length: longest sequence to expect; None: unknown.
        verbose: whether this process logs the choice.
        compiled: whether the models will be compiled later.
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
        self.wanted = wanted
        self.max_length = max_length
        self.verbose = verbose
        self._autocast = autocast
        # A compiled model would be recompiled for every segment table.
        self.attention = DENSE if compiled else "auto"
        # Keyed by the innermost model: evaluation passes it bare, training wrapped. Weakly, so that a reference can be freed
        # once its log-probabilities are precomputed.
        self._known: weakref.WeakKeyDictionary[torch.nn.Module, Verdict] = weakref.WeakKeyDictionary()
        # Policy and reference see the same batches: what is said of one is not said again of the other.
        self._told: set[str] = set()
        # The attention each was probed with: `model.set_attn_implementation` may change it at any time.
        self._probed_with: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()

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
                verdict = probe(model, attention=self.attention, max_length=self.max_length, agree=agreed_refusal)
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
