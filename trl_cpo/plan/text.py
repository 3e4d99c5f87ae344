"""Writes an estimate as text and as JSON."""

from typing import Any

from .changes import Change
from .memory import Estimate
from .size import shown


def as_text(estimate: Estimate, memory: float | None, remedy: tuple[list[Change], Estimate] | None) -> str:
    """A table of the terms, largest first; whether they fit; and if not, the cheapest changes that make them fit."""
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


def _machine_memory(estimate: Estimate) -> str:
    return (
        f"Offloading takes {shown(estimate.machine_memory)} of the machine's memory for all its devices together; DeepSpeed "
        "advises half as much again for its buffers."
    )


def as_document(estimate: Estimate, memory: float | None, remedy: tuple[list[Change], Estimate] | None) -> dict[str, Any]:
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
        "machine_memory_after_changes": None if remedy is None else round(remedy[1].machine_memory),
    }
