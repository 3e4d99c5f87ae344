"""What can be changed to make a run fit, from what costs nothing to what makes it another run."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from .memory import Estimate, PlanRequest, estimate


@dataclass(frozen=True)
class Change:
    """One change.

    Attributes:
        option: as it is written on the command line.
        cost: what it costs, in words.
        made: the changed request, or None where it is made already or has no meaning.
    """

    option: str
    cost: str
    made: Callable[[PlanRequest], PlanRequest | None]


def _smaller(request: PlanRequest) -> PlanRequest | None:
    if request.micro_batch == 1:
        return None
    return replace(request, micro_batch=1, accumulation=request.accumulation * request.micro_batch)


def _sharded(kind: str) -> Callable[[PlanRequest], PlanRequest | None]:
    order = ("single", "ddp", "zero1", "zero2", "zero3")

    def made(request: PlanRequest) -> PlanRequest | None:
        if request.gpus == 1 or request.parallel == "fsdp2" or order.index(request.parallel) >= order.index(kind):
            return None
        if kind == "zero3" and request.bits < 16:
            return None
        return replace(request, parallel=kind)

    return made


def _offloaded(request: PlanRequest) -> PlanRequest | None:
    possible = request.parallel == "zero3" and not request.offload and request.bits >= 16 and request.device == "cuda"
    return replace(request, offload=True) if possible else None


#: In the order in which they are tried: each costs more than those before it.
LADDER: tuple[Change, ...] = (
    Change(
        "--prefix_sharing True",
        "nothing, and it is faster; refused by models that cannot be packed",
        lambda r: None if r.packed else replace(r, packed=True),
    ),
    Change(
        "--optim adamw_torch_fused",
        "nothing",
        lambda r: replace(r, optim="adamw_torch_fused") if r.optim == "adamw_torch" else None,
    ),
    Change(
        "--precompute_ref_log_probs True",
        "a pass over the pairs beforehand; training is then faster",
        lambda r: None if r.precomputed or r.lora_rank or r.parallel == "fsdp2" else replace(r, precomputed=True),
    ),
    Change(
        "--gradient_checkpointing True",
        "about a third more time a step",
        lambda r: None if r.checkpointing else replace(r, checkpointing=True),
    ),
    Change(
        "--per_device_train_batch_size 1, and as many times more --gradient_accumulation_steps",
        "time, where a device is not filled by one pair; the step is the same",
        _smaller,
    ),
    Change(
        "--dtype bfloat16",
        "the frozen weights lose digits; adapters stay float32",
        lambda r: replace(r, weight_bytes=2) if r.lora_rank and r.weight_bytes == 4 and r.device == "cuda" else None,
    ),
    Change("--config_file deepspeed_configs/zero2.yaml", "communication", _sharded("zero2")),
    Change("--config_file deepspeed_configs/zero3.yaml", "more communication", _sharded("zero3")),
    Change(
        "--optim paged_adamw_8bit",
        "moments in 8 bits: slightly other updates; needs bitsandbytes",
        lambda r: (
            replace(r, optim="paged_adamw_8bit")
            if r.optim.startswith("adamw_torch") and not r.parallel.startswith("zero")
            else None
        ),
    ),
    Change(
        "--config_file deepspeed_configs/zero3_offload.yaml",
        "several times slower; needs the machine's memory",
        _offloaded,
    ),
    Change(
        "--use_peft True --lora_r 16 --lora_target_modules all-linear",
        "another training: adapters in place of all weights",
        lambda r: None if r.lora_rank else replace(r, lora_rank=16, lora_targets=("all-linear",)),
    ),
    Change(
        "--load_in_4bit True",
        "the frozen weights in 4 bits: slower, and other numbers",
        lambda r: (
            replace(r, bits=4, nested=True, parallel="ddp" if r.gpus > 1 else "single", offload=False)
            if r.lora_rank and r.bits >= 16
            else None
        ),
    ),
)


def cheapest(request: PlanRequest, memory: float) -> tuple[list[Change], Estimate] | None:
    """The cheapest changes that bring a run under `memory` bytes a device, and what it then needs; None if none do.

    One change that does it alone, the first on the ladder; else the ladder's changes from its top down as far as needed,
    less those that turn out not to be needed.
    """
    for change in LADDER:
        made = change.made(request)
        if made is not None and (found := estimate(made)).peak <= memory:
            return [change], found
    taken, current = [], request
    for change in LADDER:
        made = change.made(current)
        if made is None:
            continue
        taken, current = [*taken, change], made
        if estimate(current).peak <= memory:
            break
    else:
        return None
    for change in list(taken[:-1]):
        fewer = [other for other in taken if other is not change]
        made = _all(request, fewer)
        if made is not None and estimate(made).peak <= memory:
            taken = fewer
    return taken, estimate(_all(request, taken))


def _all(request: PlanRequest, changes: list[Change]) -> PlanRequest | None:
    for change in changes:
        request = change.made(request)
        if request is None:
            return None
    return request
