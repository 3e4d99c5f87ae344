"""Whether packing is right for a model, found out on the model itself before it is relied upon.

The probe runs a few made-up pairs padded and packed and looks at four things, each measured against what a mistake of
that kind would do to this very model: packed log-probs against padded ones; what moves on one answer when the other
answer, or another pair, is changed; whether position_ids are listened to; and sequences long enough for every limit on
how far attention reaches. Where arithmetic is narrower than float32, packed may differ from padded by no more than
padded does from itself rounded once more. Where it cannot tell, it says no.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ...model_state import evaluation_mode, snapshot
from ..adapter import DENSE, SEGMENTS, PackedPairForward, drop_segments
from ..plan import REJECTED, NotPackable, PackingPlan
from ..repack import backbone_of, layers_around, unwrap
from .comparison import EXACT, ROUNDED, Bounds, Refused, Sample, compare, mean_gap
from .random_pairs import RandomPairs
from .rounding import extra_rounding, watch_precision
from .static_checks import caveats, plain_family, probe_length, static_reason, unknown_limits

logger = logging.getLogger(__name__)

# Prompt, chosen and rejected tokens of the short pairs: no two alike, one answer longer than its rival and one shorter.
_SHORT = ((13, 9, 11), (6, 17, 7), (9, 5, 12))


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
class _Reference:
    """The padded path of a model as it was given, which packed runs are compared with.

    Attributes:
        short: a few short pairs.
        changed: the same with one answer changed in each of two pairs.
        long: pairs of full length, one after the other; none where the short ones tell all.
        holds: length up to which a finding on these holds; None: any.
        bounds: what may differ.
    """

    short: Sample
    changed: dict
    long: tuple[Sample, ...]
    holds: int | None
    bounds: Bounds


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


def probe(model: torch.nn.Module, *, attention: str = "auto", max_length: int | None = None, seed: int = 0) -> Verdict:
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
    with evaluation_mode(model), _same_start(model):
        drop_segments(inner)
        try:
            # Before the attention is switched: a model may ask for its name and compute something else.
            reference = _reference(model, max_length, seed)
        except Refused as refusal:
            return Verdict(False, str(refusal))
        for tried in tries:
            try:
                packed = PackedPairForward(model, attention=tried, required=True)
                error = _check(packed, reference)
                return Verdict(True, "", tried, reference.holds, error, caveats(model))
            except (Refused, NotPackable) as refusal:
                verdict = Verdict(False, str(refusal), tried)
            except Exception as error:  # a model may fail in any way on a mask it was not made for
                verdict = Verdict(False, f"it fails on packed rows: {_first_line(error)}", tried)
            drop_segments(inner)
    return verdict


@contextmanager
def _same_start(model: torch.nn.Module) -> Iterator[None]:
    """Every run in the block finds what the first one found: some rotary frequencies depend on what ran before."""
    restore = snapshot(model)
    hook = backbone_of(model).register_forward_pre_hook(lambda *_: restore())
    try:
        yield
    finally:
        hook.remove()


def _reference(model: torch.nn.Module, max_length: int | None, seed: int) -> _Reference:
    """Run the padded path; raise Refused where it does not run, or nothing could be told from it."""
    draw = RandomPairs(model, seed)
    inputs = draw.batch(_SHORT)
    try:
        with watch_precision(model) as narrowest:
            padded = model(**inputs)
    except Exception as error:
        raise Refused(f"it does not run with TRL's fused head, padded or packed: {_first_line(error)}") from error
    step = narrowest()
    unknown = unknown_limits(unwrap(model).config.get_text_config())
    if step and unknown:
        raise Refused(f"{', '.join(unknown)} may limit its attention, and only float32 would surely show it")
    short = _sample(model, inputs, step, seed, padded)
    changed = draw.change(inputs, rows=(0, len(_SHORT) + 1))
    tried, holds = probe_length(model, max_length)
    try:
        sizes = _long_sizes(tried, plain_family(model))
        long = tuple(_sample(model, draw.batch((size,)), step, seed) for size in sizes)
    except Exception as error:
        raise Refused(f"it fails on sequences of {tried} tokens: {_first_line(error)}") from error
    return _Reference(short, changed, long, holds, ROUNDED if step else EXACT)


def _long_sizes(length: int | None, plain: bool) -> list[tuple[int, int, int]]:
    """Prompt, chosen and rejected tokens of pairs in which sequences and packed rows of full length come about.

    Long answers put the rejected one far behind its prompt, where a limit counted in places of the row cuts it off.
    In families not known to have none, a short prompt is tried too: the row is then nearly two sequences long.
    """
    if length is None or length <= 4:
        return []
    prompts = [length - length // 2] if plain else [length - length // 2, max(1, length // 8)]
    return [(prompt, length - prompt, length - prompt - 1) for prompt in prompts]


def _sample(model: torch.nn.Module, inputs: dict, step: float, seed: int, padded=None) -> Sample:
    padded = model(**inputs) if padded is None else padded
    if not step:
        return Sample(inputs, padded, None)
    with extra_rounding(model, step, seed):
        return Sample(inputs, padded, model(**inputs))


def _check(packed: PackedPairForward, reference: _Reference) -> float:
    """Raise Refused where something is wrong; else the largest difference."""
    pairs = len(_SHORT)
    bounds, sample, changed = reference.bounds, reference.short, reference.changed
    inputs, padded, scored = sample.inputs, sample.padded, sample.scored
    plan = packed._plan(inputs)
    right = packed._run(plan, inputs)
    rejected = scored.clone()
    rejected[:pairs] = False

    # One answer is changed in each of two pairs; everything else must stay.
    moved = packed._run(packed._plan(changed), changed)
    still = scored.clone()
    still[[0, pairs + 1]] = False

    # Two mistakes on purpose, to know what they cost here: plain causal rows, and positions in disorder.
    causal, wrong_positions = _plain_causal(plan), _disordered(plan)
    wrong, wrong_moved = (packed._run(causal, batch) for batch in (inputs, changed))
    follower = torch.zeros_like(scored)
    follower[pairs] = scored[pairs]
    leaking = mean_gap(wrong, wrong_moved, follower)
    misplaced = mean_gap(right, packed._run(wrong_positions, inputs, plan), rejected)

    for outputs in (padded, right):
        if not bool(torch.isfinite(outputs.log_probs).all()):
            raise Refused("log-probs are not finite")
    if misplaced == 0:
        raise Refused("it does not listen to position_ids")
    if leaking == 0:
        raise Refused("no answer feels what stands before it, so nothing can be told")
    leak = mean_gap(right, moved, still)
    if leak > bounds.leak * leaking:
        raise Refused(f"an answer moves by {leak:.2g} nats a token when another answer is changed")
    mistake = min(misplaced, leaking)
    error = compare(sample, right, bounds, mistake)
    if padded.aux_loss is not None:
        gap = float((padded.aux_loss - right.aux_loss).abs() / padded.aux_loss.abs().clamp(min=1e-6))
        if not gap < bounds.difference:
            raise Refused(f"the mixture's auxiliary loss differs by {gap:.1%} from the padded path's")
    for sample in reference.long:
        right = packed._run(packed._plan(sample.inputs), sample.inputs)
        error = max(error, compare(sample, right, bounds, mistake))
    if packed.attention == SEGMENTS:
        # The model's other calls, as for evaluation, keep the switch, and must not notice it either.
        for sample in (reference.short, *reference.long):
            compare(sample, packed.model(**sample.inputs), bounds, mistake)
    return error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"


def _plain_causal(plan: PackingPlan) -> PackingPlan:
    """The plan with the mistake of ordinary packing: every pair one sequence, the rejected answer after the chosen."""
    parts = tuple(dataclasses.replace(p, shared=0, chosen=p.shared + p.chosen + p.rejected, rejected=0) for p in plan.parts)
    return dataclasses.replace(plan, parts=parts, branch=torch.zeros_like(plan.branch))


def _disordered(plan: PackingPlan) -> PackingPlan:
    """The plan with the rejected tails' positions mirrored."""
    positions = plan.position_ids.clone()
    tail = plan.branch == REJECTED
    positions[tail] = positions[tail].flip(0)
    return dataclasses.replace(plan, position_ids=positions)
