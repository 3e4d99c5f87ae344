"""Whether packing is right for a model, found out on the model itself before it is relied upon.

The probe runs a few made-up pairs padded and packed and looks at four things, each measured against what a mistake of
that kind would do to this very model: packed log-probs against padded ones; what moves on one answer when the other
answer, or another pair, is changed; whether position_ids are listened to; and sequences long enough for every limit on
how far attention reaches. Where it cannot tell, it says no.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..undisturbed import undisturbed
from .adapter import DENSE, SEGMENTS, PackedPairForward, drop_segments
from .fitness import caveats, probe_length, static_reason
from .made_up import MadeUpPairs
from .plan import REJECTED, NotPackable, PackingPlan
from .repack import backbone_of, layers_around, unwrap

logger = logging.getLogger(__name__)

# Prompt, chosen and rejected tokens of the short pairs: no two alike, one answer longer than its rival and one shorter.
_SHORT = ((13, 9, 11), (6, 17, 7), (9, 5, 12))
_TAIL = 12


@dataclass(frozen=True)
class Verdict:
    """What the probe found.

    Attributes:
        ok: packing is right for this model.
        reason: why not, in words for a log line; empty where it is.
        attention: the attention it was found right with.
        max_length: longest sequence the finding holds for; None: any.
        error: largest difference of a token's log-prob between packed and padded, in nats; NaN where not measured.
        notes: what to know although it is right.
    """

    ok: bool
    reason: str = ""
    attention: str | None = None
    max_length: int | None = None
    error: float = float("nan")
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.ok:
            return f"prefix sharing on, {self.attention} attention, largest difference {self.error:.1e} nats"
        return f"prefix sharing off: {self.reason}"


@dataclass(frozen=True)
class _Bounds:
    """What is allowed, as a share of what a mistake does, and outright in nats."""

    difference: float
    leak: float
    nats: float


_EXACT = _Bounds(difference=2e-3, leak=1e-3, nats=1e-2)
_ROUNDED = _Bounds(difference=0.15, leak=0.05, nats=1.0)


class _Refused(Exception):
    """A check of the probe failed; the text says which."""


def packed_forward(
    model: torch.nn.Module,
    *,
    attention: str = "auto",
    max_length: int | None = None,
    row_length: int | None = None,
    required: bool = False,
) -> tuple[Callable, Verdict]:
    """The packed forward of a model where the probe finds it right, and otherwise the model as it is.

    Args:
        model: causal language model with TRL's fused head, bare or wrapped.
        attention: "segments", "dense", or "auto": segments where the model takes them and is not compiled, else dense.
        max_length: longest sequence that will come; None: not known.
        row_length: places in a packed row with dense masks; None: as many as the longest pair takes.
        required: raise instead of falling back.

    Returns:
        What to call in place of the model, and the verdict.

    Raises:
        NotPackable: the model cannot be packed and packing is required.
    """
    verdict = probe(model, attention=attention, max_length=max_length)
    if verdict.ok:
        options = dict(attention=verdict.attention, row_length=row_length, max_length=verdict.max_length)
        return PackedPairForward(model, required=required, **options), verdict
    if required:
        raise NotPackable(
            f"prefix sharing was asked for and does not fit this model: {verdict.reason}. Leave prefix_sharing unset "
            "to run it padded."
        )
    logger.warning("%s; pairs run padded.", verdict)
    return model, verdict


def probe(
    model: torch.nn.Module, *, attention: str = "auto", max_length: int | None = None, seed: int = 0
) -> Verdict:
    """Find out whether packing is right for a model, leaving the model and all random states as they were.

    Args:
        model: causal language model with TRL's fused head, bare or wrapped; in a distributed run every process calls
            this, with the same weights and so to the same verdict.
        attention: see `packed_forward`.
        max_length: longest sequence that will come; None: not known, and the verdict says how long it holds.
        seed: of the made-up tokens.
    """
    reason = static_reason(model)
    if reason is not None:
        return Verdict(False, reason)
    inner = unwrap(model)
    if attention != "auto":
        tries = [attention]
    elif any("_orig_mod" in layer._modules for layer in layers_around(model)):
        # A compiled model would be compiled anew for every table of segments.
        tries = [DENSE]
    else:
        tries = [SEGMENTS, DENSE]
    # The numbers are the same uncompiled, and the probe's few shapes are not worth compiling for.
    model = model._modules.get("_orig_mod", model)
    verdict = Verdict(False, "no attention was tried")
    with undisturbed(model), torch.no_grad():
        for tried in tries:
            try:
                packed = PackedPairForward(model, attention=tried, required=True)
                error, holds = _check(packed, max_length, seed)
                return Verdict(True, "", tried, holds, error, caveats(model))
            except (_Refused, NotPackable) as refusal:
                verdict = Verdict(False, str(refusal), tried)
            except Exception as error:  # a model may fail in any way on a mask it was not made for
                verdict = Verdict(False, f"it fails on packed rows: {_first_line(error)}", tried)
            drop_segments(inner)
    return verdict


def _check(packed: PackedPairForward, max_length: int | None, seed: int) -> tuple[float, int | None]:
    """Raise _Refused where something is wrong; else the largest difference and the length it holds for."""
    draw = MadeUpPairs(packed.model, seed)
    pairs = len(_SHORT)
    inputs = draw.batch(_SHORT)
    try:
        with _watched(packed.model) as rounding:
            padded = packed.model(**inputs)
    except Exception as error:
        raise _Refused(f"it does not run with TRL's fused head, padded or packed: {_first_line(error)}") from error
    bounds = _ROUNDED if rounding() else _EXACT
    plan = packed._plan(inputs)
    right = packed._run(plan, inputs)
    scored = inputs["labels"][:, 1:] != -100
    rejected = scored.clone()
    rejected[:pairs] = False

    # One answer is changed in each of two pairs; everything else must stay.
    changed = draw.change(inputs, rows=(0, pairs + 1))
    moved = packed._run(packed._plan(changed), changed)
    still = scored.clone()
    still[[0, pairs + 1]] = False

    # Two mistakes on purpose, to know what they cost here: plain causal rows, and positions in disorder.
    causal, wrong_positions = _plain_causal(plan), _disordered(plan)
    wrong, wrong_moved = (packed._run(causal, batch) for batch in (inputs, changed))
    follower = torch.zeros_like(scored)
    follower[pairs] = scored[pairs]
    leaking = _mean(wrong, wrong_moved, follower)
    misplaced = _mean(right, packed._run(wrong_positions, inputs, plan), rejected)

    for outputs in (padded, right):
        if not bool(torch.isfinite(outputs.log_probs).all()):
            raise _Refused("log-probs are not finite")
    if misplaced == 0:
        raise _Refused("it does not listen to position_ids")
    if leaking == 0:
        raise _Refused("no answer feels what stands before it, so nothing can be told")
    leak = _mean(right, moved, still)
    if leak > bounds.leak * leaking:
        raise _Refused(f"an answer moves by {leak:.2g} nats a token when another answer is changed")
    error = _compare(padded, right, scored, bounds, min(misplaced, leaking))
    if padded.aux_loss is not None:
        gap = float((padded.aux_loss - right.aux_loss).abs() / padded.aux_loss.abs().clamp(min=1e-6))
        if not gap < bounds.difference:
            raise _Refused(f"the mixture's auxiliary loss differs by {gap:.1%} from the padded path's")

    tried, holds = probe_length(packed.model, max_length)
    if tried is not None and tried > _TAIL + 2:
        inputs = draw.batch(((tried - _TAIL, _TAIL, _TAIL - 3),))
        padded, right = packed.model(**inputs), packed._run(packed._plan(inputs), inputs)
        scored = inputs["labels"][:, 1:] != -100
        error = max(error, _compare(padded, right, scored, bounds, min(misplaced, leaking)))
    return error, holds


def _compare(padded, packed, where: torch.Tensor, bounds: _Bounds, mistake: float) -> float:
    """Largest gap; first tokens of answers are judged by themselves, as the seam is where a mistake hides."""
    gaps = (padded.log_probs.float() - packed.log_probs.float()).abs()
    first = where & (where.cumsum(1) == 1)
    largest = float(gaps[where].max())
    for group in (first, where & ~first):
        mean = float(gaps[group].mean())
        if not (mean <= bounds.difference * mistake and largest <= bounds.nats):
            raise _Refused(f"log-probs differ from the padded path's by {mean:.2g} nats a token, {largest:.2g} at most")
    return largest


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"


def _mean(one, other, where: torch.Tensor) -> float:
    return float((one.log_probs.float() - other.log_probs.float())[where].abs().mean())


@contextmanager
def _watched(model: torch.nn.Module) -> Iterator[Callable[[], bool]]:
    """Tell, once the model has run in the block, whether it rounds more than float32 does.

    Mixed precision is often switched on by a wrapper around the forward, so it is looked for from within.
    """
    parameters = list(unwrap(model).parameters())
    device = parameters[0].device.type
    narrow = any(p.dtype not in (torch.float32, torch.float64) for p in parameters)
    seen = [narrow or (device == "cuda" and torch.backends.cuda.matmul.allow_tf32)]
    hook = backbone_of(model).register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled(device)))
    try:
        yield lambda: any(seen)
    finally:
        hook.remove()


def _plain_causal(plan: PackingPlan) -> PackingPlan:
    """The plan with the mistake of ordinary packing: every pair one sequence, the rejected answer after the chosen."""
    parts = tuple(
        dataclasses.replace(p, shared=0, chosen=p.shared + p.chosen + p.rejected, rejected=0) for p in plan.parts
    )
    return dataclasses.replace(plan, parts=parts, branch=torch.zeros_like(plan.branch))


def _disordered(plan: PackingPlan) -> PackingPlan:
    """The plan with the rejected tails' positions mirrored."""
    positions = plan.position_ids.clone()
    tail = plan.branch == REJECTED
    positions[tail] = positions[tail].flip(0)
    return dataclasses.replace(plan, position_ids=positions)
