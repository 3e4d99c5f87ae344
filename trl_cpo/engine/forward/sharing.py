"""Which forward the pairs of a model go through: packed where the probe finds it right, and the model itself elsewhere."""

import logging
import weakref
from collections.abc import Callable

import torch

from .adapter import DENSE, PackedPairForward
from .plan import NotPackable
from .probing.probe import Verdict, probe
from .repack import unwrap
from .segments import NAME

logger = logging.getLogger(__name__)


class PrefixSharing:
    """The forward of each model of a training: policy and reference, each probed once, when it is first asked for.

    Args:
        wanted: False for the padded forward always; True to refuse models that cannot be packed; None to pack those
            that can.
        max_length: longest sequence that will come; None: not known.
        verbose: whether this process writes the line that says which way it is.
        compiled: whether the models will be compiled, which they are not yet when they are first asked for.
    """

    def __init__(self, wanted: bool | None, max_length: int | None, verbose: bool = True, compiled: bool = False):
        self.wanted = wanted
        self.max_length = max_length
        self.verbose = verbose
        # A compiled model would be compiled anew for every table of segments.
        self.attention = DENSE if compiled else "auto"
        # By the model inside all wrappers: the same one comes bare in evaluation and wrapped in training. Held weakly,
        # because a reference is dropped once its log-probabilities are precomputed, and must be free to go.
        self._known: weakref.WeakKeyDictionary[torch.nn.Module, Verdict] = weakref.WeakKeyDictionary()
        # The attention each was judged with: `model.set_attn_implementation` may exchange it at any time.
        self._probed_with: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()

    def of(self, model: torch.nn.Module) -> Callable:
        """What to call in place of `model`.

        Raises:
            NotPackable: the model cannot be packed, and it was asked for.
        """
        if self.wanted is False:
            return model
        verdict = self.verdict(model)
        if not verdict.ok:
            return model
        return PackedPairForward(model, attention=verdict.attention, max_length=verdict.max_length, required=bool(self.wanted))

    def verdict(self, model: torch.nn.Module) -> Verdict:
        """What the probe found for `model` with its present attention, now or before.

        Raises:
            NotPackable: the model cannot be packed, and it was asked for.
        """
        inner = unwrap(model)
        attention = _attention_of(inner)
        if self._probed_with.get(inner) != attention:
            verdict = probe(model, attention=self.attention, max_length=self.max_length)
            if not verdict.ok and self.wanted:
                raise NotPackable(
                    f"prefix_sharing=True, and it does not fit {type(inner).__name__}: {verdict.reason}. Leave "
                    "prefix_sharing unset to train it padded."
                )
            if self.verbose:
                logger.log(logging.INFO if verdict.ok else logging.WARNING, "%s: %s", type(inner).__name__, verdict)
                for note in verdict.notes:
                    logger.warning("%s: %s", type(inner).__name__, note)
            self._known[inner], self._probed_with[inner] = verdict, attention
        return self._known[inner]


def _attention_of(model: torch.nn.Module) -> str:
    """The attention a model was given; segments stand in the place of sdpa."""
    given = getattr(getattr(model, "config", None), "_attn_implementation", "")
    return "sdpa" if given == NAME else given
