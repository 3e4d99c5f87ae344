"""The probe: tests on a model itself whether packing is correct for it, before packing is used.

It runs a few random pairs padded and packed and checks four things, each against the effect that a mistake of that kind has
on this model:

- packed log-probs equal the padded ones;
- an answer does not change when the other answer, or another pair, is changed;
- the model uses position_ids;
- all this holds for sequences long enough to reach every limit on attention.

In lower precision than float32, packed may differ from padded by no more than padded differs from itself with extra
rounding. If the probe cannot decide, packing is refused.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...model_state import evaluation_mode, snapshot
from ..adapter import PackedPairForward
from ..backends import BACK_ENDS, DENSE, Choice, choice_for, kernel_of, product_dtype, switch_back
from ..device_check import holding_faults
from ..plan import REJECTED, NotPackable, PackingPlan
from ..repack import backbone_of, layers_around, unwrap
from .comparison import EXACT, ROUNDED, Bounds, Refused, Sample, compare, mean_gap
from .random_pairs import RandomPairs
from .rounding import extra_rounding, watch_precision
from .static_checks import caveats, plain_family, probe_length, static_reason, unknown_limits

logger = logging.getLogger(__name__)

# Prompt, chosen and rejected tokens of the short pairs: no two pairs alike, chosen answers both longer and shorter.
_SHORT = ((13, 9, 11), (6, 17, 7), (9, 5, 12))


@dataclass(frozen=True)
class Verdict:
    """The result of a probe.

    Attributes:
        ok: whether packing is correct for this model.
        reason: why not, as a clause for a log line; empty if `ok`.
        attention: the attention that was tested.
        max_length: longest sequence that the result holds for; None: any.
        error: largest difference of a token's log-prob between packed and padded, in nats; NaN if not measured.
        notes: caveats despite `ok`.
        computed: the attention's kernel and the dtype of the model's products.
        why: why no better attention was taken; empty if there is none.
    """

    ok: bool
    reason: str = ""
    attention: str | None = None
    max_length: int | None = None
    error: float = float("nan")
    notes: tuple[str, ...] = ()
    computed: str = ""
    why: str = ""

    def __str__(self) -> str:
        if self.ok:
            why = f" ({self.why})" if self.why else ""
            return (
                f"prefix sharing on, {self.attention} attention{why}: {self.computed}, largest difference {self.error:.1e} nats"
            )
        return f"prefix sharing off: {self.reason}"


@dataclass(frozen=True)
class _Reference:
    """The padded results that packed runs are compared with.

    Attributes:
        short: a few short pairs.
        changed: the same pairs with one answer changed in each of two.
        long: pairs of full length, run one by one; empty if the short ones suffice.
        holds: length up to which the result holds; None: any.
        bounds: the tolerances.
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
    """The packed forward of a model if the probe finds it correct, else the model itself.

    Args:
        model: causal language model with TRL's fused head, bare or wrapped.
        attention: a back end of `backends`, or "auto": those that can do what the model needs, best first.
        max_length: longest sequence to expect; None: unknown.
        row_length: places in a packed row with dense masks; None: the length of the longest pair.
        required: raise instead of falling back to the model.

    Returns:
        The forward to call in place of the model, and the verdict.

    Raises:
        NotPackable: packing is required, and the model cannot be packed.
    """
    verdict = probe(model, attention=attention, max_length=max_length)
    if verdict.ok:
        options: dict[str, Any] = dict(attention=verdict.attention, row_length=row_length, max_length=verdict.max_length)
        return PackedPairForward(model, required=required, **options), verdict
    if required:
        raise NotPackable(
            f"Prefix sharing does not work with this model: {verdict.reason}. Leave prefix_sharing unset to run it padded."
        )
    logger.warning("%s; pairs run padded.", verdict)
    return model, verdict


def probe(
    model: torch.nn.Module,
    *,
    attention: str = "auto",
    max_length: int | None = None,
    seed: int = 0,
    agree: Callable[[str], str] = lambda reason: reason,
) -> Verdict:
    """Tests whether packing is correct for a model; leaves the model and all random states unchanged.

    Each back end is tried with the same number of forwards, whatever they give, so that the processes of a sharded model
    never wait for each other. The precision is that of the autocast around the call.

    Args:
        model: causal language model with TRL's fused head, bare or wrapped. In a distributed run every process calls the
            probe.
        attention: see `packed_forward`.
        max_length: longest sequence to expect; None: unknown, and the verdict says up to which length it holds.
        seed: seed of the random tokens.
        agree: gives this process's reason to refuse, empty if it has none, to all processes, and returns the one that holds
            for all. Called after the padded runs, and after each back end.

    Raises:
        MemoryError, RuntimeError: memory ran out.
    """
    reason = static_reason(model)
    if reason is not None:
        return Verdict(False, reason)
    inner = unwrap(model)
    if attention != "auto":
        choice = Choice((attention,))
    elif any("_orig_mod" in layer._modules for layer in layers_around(model)):
        # A compiled model would be recompiled for every segment table.
        choice = Choice((DENSE,))
    else:
        choice = choice_for(inner)
    # Uncompiled, the numbers are the same; the probe's few shapes are not worth compiling.
    model = model._modules.get("_orig_mod", model)
    verdict = Verdict(False, "no attention was tried")
    with evaluation_mode(model), _same_start(model):
        switch_back(inner)
        # Before the attention is switched: a model may compute something else depending on its name.
        reference, reason = _outcome(partial(_reference, model, max_length, seed), "")
        if reason := agree(reason):
            return Verdict(False, reason)
        why = [choice.why] if choice.why else []
        for tried in choice.names:
            error, reason = _outcome(partial(_try, model, tried, reference), "it fails on packed rows: ")
            if not (reason := agree(reason)):
                computed = f"{kernel_of(inner, tried)}, {str(product_dtype(inner)).removeprefix('torch.')}"
                return Verdict(True, "", tried, reference.holds, error, caveats(model), computed, "; ".join(why))
            verdict = Verdict(False, reason, tried)
            why.append(f"not {tried}: {reason}")
            switch_back(inner)
    return verdict


def _outcome(run: Callable[[], Any], failed: str) -> tuple[Any, str]:
    """What `run` returns, and an empty reason; or None, and why packing is refused."""
    try:
        return run(), ""
    except (Refused, NotPackable) as refusal:
        return None, str(refusal)
    except Exception as error:  # an unexpected mask may make a model fail in any way
        _raise_out_of_memory(error)
        return None, f"{failed}{_first_line(error)}"


def _raise_out_of_memory(error: Exception) -> None:
    """Raises `error` if it says that memory ran out: no verdict on the model, and the other processes must not go on."""
    texts = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts):
        error.add_note(
            "Memory ran out while a few pairs were run to test the packed forward. A training step needs more than that: "
            "shorten max_length, or load the model in fewer bits or on more devices."
        )
        raise error


@contextmanager
def _same_start(model: torch.nn.Module) -> Iterator[None]:
    """Within the block, every run starts from the same buffers; some rotary frequencies depend on earlier runs."""
    restore = snapshot(model)
    hook = backbone_of(model).register_forward_pre_hook(lambda *_: restore())
    try:
        yield
    finally:
        hook.remove()


def _reference(model: torch.nn.Module, max_length: int | None, seed: int) -> _Reference:
    """Runs the padded path; raises Refused if it fails, or if nothing could be concluded from it."""
    draw = RandomPairs(model, seed)
    inputs = draw.batch(_SHORT)
    with watch_precision(model) as narrowest, _refused("it does not run with TRL's fused head, padded or packed"):
        padded = model(**inputs)
    step = narrowest()
    unknown = unknown_limits(unwrap(model).config.get_text_config())
    if step and unknown:
        raise Refused(f"{', '.join(unknown)} may limit its attention, which the probe can detect reliably only in float32")
    short = _sample(model, inputs, step, seed, padded)
    changed = draw.change(inputs, rows=(0, len(_SHORT) + 1))
    tried, holds = probe_length(model, max_length)
    sizes = _long_sizes(tried, plain_family(model))
    with _refused(f"it fails on sequences of {tried} tokens"):
        long = tuple(_sample(model, draw.batch((size,)), step, seed) for size in sizes)
    return _Reference(short, changed, long, holds, ROUNDED if step else EXACT)


@contextmanager
def _refused(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _raise_out_of_memory(error)
        raise Refused(f"{what}: {_first_line(error)}") from error


def _long_sizes(length: int | None, plain: bool) -> list[tuple[int, int, int]]:
    """Prompt, chosen and rejected lengths of pairs that give sequences and packed rows of full length.

    Long answers put the rejected one far from its prompt in the row; a limit that counts places in the row would cut the
    prompt off. Unless the family is known to have no such limit, a short prompt is tried as well, so that the row is nearly
    two sequences long.
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


def _try(model: torch.nn.Module, attention: str, reference: _Reference) -> float:
    return _check(PackedPairForward(model, attention=attention, required=True), reference)


def _check(packed: PackedPairForward, reference: _Reference) -> float:
    """Returns the largest difference in nats; raises Refused if something is wrong."""
    pairs = len(_SHORT)
    bounds, sample, changed = reference.bounds, reference.short, reference.changed
    inputs, padded, scored = sample.inputs, sample.padded, sample.scored

    # All forwards first, and only then what they gave: with sharded weights every process must run as many.
    with holding_faults() as faults:
        plan = packed._plan(inputs)
        right = packed._run(plan, inputs)
        # One answer is changed in each of two pairs; all others must keep their log-probs.
        moved = packed._run(packed._plan(changed), changed)
        # Two deliberate mistakes, to measure their effect on this model: plain causal rows, and wrong positions.
        causal, wrong_positions = _plain_causal(plan), _disordered(plan)
        wrong, wrong_moved = (packed._run(causal, batch) for batch in (inputs, changed))
        mirrored = packed._run(wrong_positions, inputs, plan)
        long = [packed._run(packed._plan(sample.inputs), sample.inputs) for sample in reference.long]
        ordinary = []
        if BACK_ENDS[packed.attention].one_row:
            # The switch stays on for the model's other calls, such as evaluation; they must not change either.
            ordinary = [packed.model(**sample.inputs) for sample in (reference.short, *reference.long)]
    if faults:
        raise Refused(faults[0])

    rejected = scored.clone()
    rejected[:pairs] = False
    still = scored.clone()
    still[[0, pairs + 1]] = False
    follower = torch.zeros_like(scored)
    follower[pairs] = scored[pairs]
    leaking = mean_gap(wrong, wrong_moved, follower)
    misplaced = mean_gap(right, mirrored, rejected)
    for outputs in (padded, right):
        if not bool(torch.isfinite(outputs.log_probs).all()):
            raise Refused("log-probs are not finite")
    if misplaced == 0:
        raise Refused("it ignores position_ids")
    if leaking == 0:
        raise Refused("no answer depends on the tokens before it, so the probe cannot decide")
    leak = mean_gap(right, moved, still)
    if leak > bounds.leak * leaking:
        raise Refused(f"an answer changes by {leak:.2g} nats a token when another answer is changed")
    mistake = min(misplaced, leaking)
    error = compare(sample, right, bounds, mistake)
    if padded.aux_loss is not None:
        gap = float((padded.aux_loss - right.aux_loss).abs() / padded.aux_loss.abs().clamp(min=1e-6))
        if not gap < bounds.difference:
            raise Refused(f"the mixture's auxiliary loss differs by {gap:.1%} from the padded path's")
    for sample, outputs in zip(reference.long, long, strict=True):
        error = max(error, compare(sample, outputs, bounds, mistake))
    for sample, outputs in zip((reference.short, *reference.long), ordinary, strict=False):
        compare(sample, outputs, bounds, mistake)
    return error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"


def _plain_causal(plan: PackingPlan) -> PackingPlan:
    """The plan with ordinary packing's mistake: each pair is one sequence, the rejected answer sees the chosen one."""
    parts = tuple(dataclasses.replace(p, shared=0, chosen=p.shared + p.chosen + p.rejected, rejected=0) for p in plan.parts)
    return dataclasses.replace(plan, parts=parts, branch=torch.zeros_like(plan.branch))


def _disordered(plan: PackingPlan) -> PackingPlan:
    """The plan with the rejected tails' positions mirrored."""
    positions = plan.position_ids.clone()
    tail = plan.branch == REJECTED
    positions[tail] = positions[tail].flip(0)
    return dataclasses.replace(plan, position_ids=positions)
