"""Writes an estimate as text and as JSON."""

from collections.abc import Sequence
from typing import Any

from .changes import Change
from .memory import Estimate, PlanRequest
from .size import shown


def as_text(
    estimate: Estimate,
    memory: float | None,
    remedy: tuple[list[Change], Estimate] | None,
    better: Sequence[Estimate] = (),
) -> str:
    """A table of the terms, largest first; whether they fit; and if not, the cheapest changes that make them fit.

    `better` are the ways to the same steps in less time (`quicker`).
    """
    request, shape = estimate.request, estimate.shape
    kind = f"LoRA r {request.lora_rank}" if request.lora_rank else "full fine-tuning"
    base = "" if request.bits >= 16 else f", base in {request.bits} bits"
    rows = "packed" if request.packed else "padded"
    lines = [
        f"{shape.weights / 1e6:,.0f} million weights, {shape.layers} blocks; {kind}{base}; {request.gpus} x {request.device}, "
        f"{request.parallel}",
        f"{request.micro_batch} pairs per micro-batch, {rows}, rows of {request.max_length} tokens, "
        f"{100 * request.prompt_share:.0f} % of them prompt",
        "",
    ]
    for name, size in estimate.at_peak.items():
        lines.append(f"  {name:<22} {shown(size):>9}  {100 * size / estimate.peak:3.0f} %")
    largest = next(iter(estimate.at_peak))
    lines.append(
        f"  {'together':<22} {shown(estimate.peak):>9}  at the end of the {estimate.peak_moment}"
        if estimate.peak_moment != "optimizer step"
        else f"  {'together':<22} {shown(estimate.peak):>9}  in the optimizer step"
    )
    lines += ["", f"The largest part: {largest}."]
    if request.offload:
        lines.append(_machine_memory(estimate))
    if memory is None:
        return "\n".join(lines)
    if estimate.peak <= memory:
        lines.append(f"It fits into {shown(memory)}, with {shown(memory - estimate.peak)} to spare.")
        lines += ["The same steps in less time:"] * bool(better) + [_in_less_time(request, way) for way in better]
    elif remedy is None:
        lines.append(f"It does not fit into {shown(memory)}, and no change known here makes it fit.")
    else:
        changes, after = remedy
        lines.append(
            f"It does not fit into {shown(memory)}. The cheapest change that makes it fit (needs {shown(after.peak)}):"
        )
        lines += [f"  {change.option}\n      costs {change.cost}" for change in changes]
        if after.request.offload and not request.offload:
            lines.append(_machine_memory(after))
    return "\n".join(lines)


def _in_less_time(request: PlanRequest, way: Estimate) -> str:
    made, options, why = way.request, [], []
    if made.checkpointing != request.checkpointing:
        options.append("--gradient_checkpointing False")
        # In passes over the weights: forward, gradients of states, gradients of all weights, forward again; the reference's.
        passes = (3 if request.lora_rank else 4) + (0 if request.precomputed else 1)
        why.append(f"saves 1/{passes} of the arithmetic")
    if made.micro_batch != request.micro_batch:
        options.append(f"--per_device_train_batch_size {made.micro_batch} --gradient_accumulation_steps {made.accumulation}")
        why.append("the GPU waits less for the CPU")
    return f"  {' '.join(options)}\n      {', '.join(why)}; needs {shown(way.peak)}"


def _machine_memory(estimate: Estimate) -> str:
    return (
        f"Offloading takes {shown(estimate.machine_memory)} of the machine's memory for all its devices together; DeepSpeed "
        "advises half as much again for its buffers."
    )


def as_document(
    estimate: Estimate,
    memory: float | None,
    remedy: tuple[list[Change], Estimate] | None,
    better: Sequence[Estimate] = (),
) -> dict[str, Any]:
    """The same as plain values for JSON, in bytes."""
    request = {name: value for name, value in vars(estimate.request).items() if name != "config"}
    return {
        "request": request,
        "weights": estimate.shape.weights,
        "terms": {name: round(size) for name, size in estimate.at_peak.items()},
        "peak": round(estimate.peak),
        "peak_moment": estimate.peak_moment,
        "machine_memory": round(estimate.machine_memory),
        "memory": memory,
        "fits": None if memory is None else estimate.peak <= memory,
        "changes": None if remedy is None else [change.option for change in remedy[0]],
        "peak_after_changes": None if remedy is None else round(remedy[1].peak),
        "quicker": [
            {
                "peak": round(way.peak),
                "checkpointing": way.request.checkpointing,
                "micro_batch": way.request.micro_batch,
                "accumulation": way.request.accumulation,
            }
            for way in better
        ],
        "machine_memory_after_changes": None if remedy is None else round(remedy[1].machine_memory),
    }
