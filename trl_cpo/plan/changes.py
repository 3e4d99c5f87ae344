"""Changes that make a run fit, from those that cost nothing to those that change the training."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from .memory import Estimate, PlanRequest, estimate


@dataclass(frozen=True)
class Change:
    """One change.

    Attributes:
        option: the change as written on the command line.
        cost: what it costs, in words.
        made: applies the change to a request; None if it is already made or does not apply.
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


#: The changes in the order in which they are tried: each costs more than those before it.
LADDER: tuple[Change, ...] = (
    Change(
        "--prefix_sharing True",
        "nothing, and is faster; models that cannot be packed refuse it",
        lambda r: None if r.packed else replace(r, packed=True),
    ),
    Change(
        "--optim adamw_torch_fused",
        "nothing",
        lambda r: replace(r, optim="adamw_torch_fused") if r.optim == "adamw_torch" else None,
    ),
    Change(
        "--precompute_ref_log_probs True",
        "one pass over the pairs before training, which is then faster",
        lambda r: None if r.precomputed or r.lora_rank or r.parallel == "fsdp2" else replace(r, precomputed=True),
    ),
    Change(
        "--gradient_checkpointing True",
        "about a third more time per step",
        lambda r: None if r.checkpointing else replace(r, checkpointing=True),
    ),
    Change(
        "--per_device_train_batch_size 1, and as many times more --gradient_accumulation_steps",
        "time, if one pair does not fill a device; the step stays the same",
        _smaller,
    ),
    Change(
        "--dtype bfloat16",
        "precision of the frozen weights; adapters stay float32",
        lambda r: replace(r, weight_bytes=2) if r.lora_rank and r.weight_bytes == 4 and r.device == "cuda" else None,
    ),
    Change(
        "--bnb_4bit_quant_storage bfloat16",
        "communication: FSDP2 then shards the 4-bit weights, which each device holds whole otherwise",
        lambda r: replace(r, quant_storage="bfloat16") if r.bits == 4 and not r.shards_quantized else None,
    ),
    Change("--config_file deepspeed_configs/zero2.yaml", "communication", _sharded("zero2")),
    Change("--config_file deepspeed_configs/zero3.yaml", "more communication", _sharded("zero3")),
    Change(
        "--optim paged_adamw_8bit",
        "moments in 8 bits, so slightly different updates; needs bitsandbytes",
        lambda r: (
            replace(r, optim="paged_adamw_8bit")
            if r.optim.startswith("adamw_torch") and not r.parallel.startswith("zero")
            else None
        ),
    ),
    Change(
        "--config_file deepspeed_configs/zero3_offload.yaml",
        "several times the time, and memory of the machine",
        _offloaded,
    ),
    Change(
        "--use_peft True --lora_r 16 --lora_target_modules all-linear",
        "a different training: adapters instead of all weights",
        lambda r: None if r.lora_rank else replace(r, lora_rank=16, lora_targets=("all-linear",)),
    ),
    Change(
        "--load_in_4bit True",
        "the frozen weights in 4 bits: slower, and different results",
        lambda r: (
            replace(r, bits=4, nested=True, parallel="ddp" if r.gpus > 1 else "single", offload=False)
            if r.lora_rank and r.bits >= 16
            else None
        ),
    ),
)


#: Share of a device's memory that a quicker run may take, to be recommended.
SAFE = 0.9


def quicker(request: PlanRequest, memory: float) -> list[Estimate]:
    """The same steps in less time, where that fits into `SAFE` of `memory` bytes: at most two ways, none if there is none.

    First without gradient checkpointing, in as few micro-batches as fit and no more than now: a GPU waits for the CPU where
    they are small. Then with it, where that makes them fewer still. Padded pairs, and a CPU's, stay in their micro-batches:
    larger ones are padded more, and nothing waits.
    """
    joins = request.packed and request.device == "cuda"
    factors = [n for n in range(request.accumulation, 0, -1) if request.accumulation % n == 0] if joins else [1]
    found: list[Estimate] = []
    for checkpointing in (False, True) if request.checkpointing else (False,):
        for times in factors:
            pairs, left = request.micro_batch * times, request.accumulation // times
            tried = replace(request, checkpointing=checkpointing, micro_batch=pairs, accumulation=left)
            if tried == request or (found and pairs <= found[0].request.micro_batch):
                break
            if (made := estimate(tried)).peak <= SAFE * memory:
                found.append(made)
                break
    return found


def cheapest(request: PlanRequest, memory: float) -> tuple[list[Change], Estimate] | None:
    """The cheapest changes that bring a run under `memory` bytes per device, and the new estimate; None if none do.

    If one change is enough, returns the first such change of `LADDER`. Otherwise applies the ladder from the top until the
    run fits, then drops the changes that turn out to be unnecessary.

    Raises:
        ValueError: as `estimate`.
    """
    for change in LADDER:
        made = change.made(request)
        if made is not None and (found := estimate(made)).peak <= memory:
            return [change], found
    taken: list[Change] = []
    current = request
    for change in LADDER:
        made = change.made(current)
        if made is None:
            continue
        taken, current = [*taken, change], made
        if estimate(current).peak <= memory:
            break
    else:
        return None
    best = current
    for change in list(taken[:-1]):
        fewer = [other for other in taken if other is not change]
        made = _all(request, fewer)
        if made is not None and estimate(made).peak <= memory:
            taken, best = fewer, made
    return taken, estimate(best)


def _all(request: PlanRequest, changes: list[Change]) -> PlanRequest | None:
    for change in changes:
        made = change.made(request)
        if made is None:
            return None
        request = made
    return request
