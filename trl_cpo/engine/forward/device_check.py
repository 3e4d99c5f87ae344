"""Attention over packed pairs held against plain attention on the device itself: output and gradients, in milliseconds.

The kernels cannot be tested where there is no such device, so each device tests its own before their first use.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .mask import LayerKind, visible
from .plan import NotPackable, PackingPlan, plan_pairs
from .segments import segment_table

#: Prompt, chosen and rejected tokens: longer and shorter than a kernel's block, no prompt, one-token answers.
_SIZES = ((150, 60, 190), (0, 5, 9), (37, 1, 1), (1, 70, 3))
#: A window that binds at these sizes.
_WINDOW = 100


@dataclass(frozen=True)
class Errors:
    """Largest errors against float64: of the kernel, and of plain attention in the same dtype."""

    output: tuple[float, float]
    gradient: tuple[float, float]

    def __str__(self) -> str:
        return "; ".join(
            f"{name} off by {ours:.1e}, plain attention by {plain:.1e}"
            for name, (ours, plain) in (("output", self.output), ("gradients", self.gradient))
        )


def check_attention(
    attend: Callable[..., torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    groups: int,
    sizes: tuple[int, int],
    window: int | None,
) -> Errors:
    """Compares an attention over a packed row with masked attention by the definition.

    Args:
        attend: takes queries, keys, values (T, heads, size), a segment table and a window; returns (T, heads, value size).
        groups: number of query heads to a key head; two key heads are tried.
        sizes: of a head's queries and keys, and of its values.
        window: the layer's window, in tokens; None: none.

    Raises:
        NotPackable: it is off by more than plain attention in the same dtype.
    """
    kind = LayerKind(window=None if window is None else min(window, _WINDOW))
    plan = _plan()
    table, seen = segment_table(plan, kind), visible(plan, kind, device)[0]
    generator = torch.Generator().manual_seed(0)
    shapes = [(2 * groups, sizes[0]), (2, sizes[0]), (2, sizes[1]), (2 * groups, sizes[1])]
    *drawn, weight = (torch.randn(plan.tokens, *shape, generator=generator).to(device, dtype) for shape in shapes)

    def plain(queries, keys, values):
        q, k, v = (t.repeat_interleave(queries.shape[1] // t.shape[1], 1).transpose(0, 1) for t in (queries, keys, values))
        scores = (q @ k.transpose(1, 2) * sizes[0] ** -0.5).masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(0, 1)

    def run(attention, dtype) -> list[torch.Tensor]:
        inputs = [t.to(dtype, copy=True).requires_grad_() for t in drawn]
        # Hooks of our own: the check may come in a layer that is checkpointed, which counts what is kept for backward.
        kept = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
        with torch.enable_grad(), torch.autocast(device.type, enabled=False), kept:
            out = attention(*inputs)
            gradients = torch.autograd.grad((out * weight.to(dtype)).sum(), inputs)
        return [t.detach().double() for t in (out, *gradients)]

    truth, by_hand = run(plain, torch.float64), run(plain, dtype)
    ours = run(lambda *inputs: attend(*inputs, table, kind.window), dtype)
    errors = []
    for name, exact, plain_one, got in zip(("output", "dq", "dk", "dv"), truth, by_hand, ours, strict=True):
        error, of_plain = (float((t - exact).abs().max()) for t in (got, plain_one))
        if not error <= 4 * max(of_plain, torch.finfo(dtype).eps * float(exact.abs().max())):
            raise NotPackable(
                f"its attention on {device} is wrong: {name} off by {error:.2g} in {dtype}, plain attention by {of_plain:.2g}"
            )
        errors.append((error, of_plain))
    return Errors(errors[0], (max(e for e, _ in errors[1:]), max(p for _, p in errors[1:])))


_held: list[str] | None = None


@contextmanager
def holding_faults() -> Iterator[list[str]]:
    """Within the block, faults go to the list that it gives: a forward that one process breaks off leaves others waiting."""
    global _held
    before, _held = _held, []
    try:
        yield _held
    finally:
        _held = before


def report(fault: str) -> None:
    """Raises `NotPackable` if there is a fault, or holds it (`holding_faults`)."""
    if fault and _held is None:
        raise NotPackable(fault)
    if fault and _held is not None:
        _held.append(fault)


def _plan() -> PackingPlan:
    """The plan of pairs of these sizes; the two answers of a pair differ from their first token on."""
    lengths = [(s, s + c) for s, c, _ in _SIZES] + [(s, s + r) for s, _, r in _SIZES]
    places = torch.arange(max(length for _, length in lengths))
    ids, mask = torch.zeros(2, len(lengths), len(places), dtype=torch.long)
    for row, (shared, length) in enumerate(lengths):
        mask[row] = places < length
        ids[row] = torch.where(places < shared, 0, 1 + row)
    return plan_pairs(ids, mask, torch.full_like(ids, -100), one_row=True)
