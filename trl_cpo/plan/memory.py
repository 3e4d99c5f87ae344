"""A run's memory on each device: one function per term, and their sum at the peak."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .activations import kept_by
from .shape import INT8_BYTES, NF4_BYTES, NF4_NESTED_BYTES, Shape, shape_of

PARALLEL = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")

#: Tile size of TRL's fused head, in tokens and vocabulary entries. Triton overwrites a tile in place. Without Triton,
#: HEAD_COPIES tensors of a tile's size are alive at once (counted in TRL's code: backward, float32).
HEAD_TOKENS, HEAD_ENTRIES, HEAD_COPIES = 4096, 32768, 7

#: Bytes that an optimizer keeps per trainable weight, by TrainingArguments.optim; any other keeps two moments of the
#: weight's type.
OPTIMIZER_BYTES = {
    "adamw_8bit": 2.0,
    "adamw_bnb_8bit": 2.0,
    "paged_adamw_8bit": 2.0,
    "paged_adamw_32bit": 8.0,
    "adafactor": 0.1,
    "sgd": 0.0,
    "lion_8bit": 1.0,
    "paged_lion_8bit": 1.0,
    "lion_32bit": 4.0,
    "paged_lion_32bit": 4.0,
}

#: Types of bnb_4bit_quant_storage that FSDP2 shards; Accelerate leaves the others out of it.
FLOAT_STORAGE = ("bfloat16", "float16", "float32", "float64")

#: Bytes that a trainable weight takes in the machine's memory beside itself where ZeRO-3 offloads: float32 copy, gradient and
#: two moments, as DeepSpeed counts them (`estimate_zero3_model_states_mem_needs`).
OFFLOADED_BYTES = 16.0

#: Allowance for CUDA's context, libraries and fragmentation, beside tensors. Not measured.
CUDA_BYTES = 1.0e9
#: Growth of a CPU process beside tensors, from its imports to the end of training: measured, 41 MB.
CPU_BYTES = 4.1e7


@dataclass(frozen=True)
class PlanRequest:
    """What a training run's memory depends on.

    Attributes:
        config: the model's transformers config.
        gpus: devices that share the work.
        parallel: "single", "ddp", "zero1", "zero2", "zero3" or "fsdp2".
        offload: whether ZeRO-3 keeps weights and optimizer in CPU memory.
        device: "cuda" or "cpu".
        weight_bytes: bytes of a weight as loaded, 4 (float32, TRL's default) or 2.
        bits: 8 or 4 with bitsandbytes; 16 or more: weights as loaded.
        nested: whether the scales of 4-bit layers are quantized.
        quant_storage: type that 4-bit weights are stored as (bnb_4bit_quant_storage).
        autocast: whether training uses bf16 or fp16 mixed precision.
        lora_rank, lora_targets: LoRA's rank and target layers, as PEFT takes them; rank 0 is full fine-tuning.
        precomputed: whether the reference is scored before training.
        checkpointing, packed: whether gradient checkpointing and prefix sharing are on.
        micro_batch: pairs per device and forward pass.
        accumulation: micro-batches per step.
        max_length: tokens of the longest row.
        prompt_share: the prompt's share of that row, 0 to 1.
        optim: TrainingArguments.optim.
    """

    config: Any
    gpus: int = 1
    parallel: str = "single"
    offload: bool = False
    device: str = "cuda"
    weight_bytes: int = 4
    bits: int = 16
    nested: bool = False
    quant_storage: str = "uint8"
    autocast: bool = True
    lora_rank: int = 0
    lora_targets: str | tuple[str, ...] = ("all-linear",)
    precomputed: bool = False
    checkpointing: bool = True
    packed: bool = True
    micro_batch: int = 8
    accumulation: int = 1
    max_length: int = 1024
    prompt_share: float = 0.5
    optim: str = "adamw_torch_fused"

    @property
    def held_bytes(self) -> int:
        """Bytes of a weight during training: DeepSpeed casts the weights of a mixed-precision run to half precision."""
        return 2 if self.autocast and self.parallel.startswith("zero") else self.weight_bytes

    @property
    def computes_in_half(self) -> bool:
        """Whether products are computed in 16 bits."""
        return self.autocast or self.held_bytes == 2

    @property
    def shards_quantized(self) -> bool:
        """Whether sharded weights include the quantized ones: FSDP2 shards floating-point types alone."""
        return self.parallel != "fsdp2" or (self.bits == 4 and self.quant_storage in FLOAT_STORAGE)


@dataclass(frozen=True)
class Estimate:
    """Bytes by term: what is always resident, and what three moments of a step add.

    Attributes:
        resident: held throughout training.
        forward: added at the end of the forward pass.
        backward: added at the end of the backward pass.
        step: added while the optimizer steps.
    """

    request: PlanRequest
    shape: Shape
    resident: dict[str, float]
    forward: dict[str, float]
    backward: dict[str, float]
    step: dict[str, float]

    @property
    def moments(self) -> dict[str, dict[str, float]]:
        return {"forward": self.forward, "backward": self.backward, "optimizer step": self.step}

    @property
    def peak_moment(self) -> str:
        """The moment with the highest total."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def at_peak(self) -> dict[str, float]:
        """The terms at the peak, largest first."""
        terms = {**self.resident, **self.moments[self.peak_moment]}
        return dict(sorted(((k, v) for k, v in terms.items() if v), key=lambda item: -item[1]))

    @property
    def machine_memory(self) -> float:
        """Bytes of the machine's memory, for all its devices, that offloading takes; 0 without."""
        return offloaded(self.request, self.shape)

    @property
    def peak(self) -> float:
        """Bytes per device at the peak."""
        return sum(self.at_peak.values())


def quantized_bytes(request: PlanRequest, shape: Shape) -> float:
    """Bytes of a whole model's quantized layers."""
    if request.bits >= 16:
        return 0.0
    each = INT8_BYTES if request.bits == 8 else NF4_NESTED_BYTES if request.nested else NF4_BYTES
    return each * shape.quantizable


def other_bytes(request: PlanRequest, shape: Shape) -> float:
    """Bytes of a whole model's weights that are not quantized, as held."""
    return request.held_bytes * (shape.weights - (shape.quantizable if request.bits < 16 else 0))


def weights(request: PlanRequest, shape: Shape) -> float:
    """The policy's weights without adapters: whole, one shard with ZeRO-3 and FSDP2, none when offloaded."""
    if request.offload:
        return 0.0
    shares = _shares_of_weights(request)
    quantized = quantized_bytes(request, shape)
    return other_bytes(request, shape) / shares + (quantized / shares if request.shards_quantized else quantized)


def gathered(request: PlanRequest, shape: Shape) -> float:
    """Sharded weights gathered for use: two blocks and the head, in the precision of the computation.

    Quantized blocks are gathered as quantized, or lie there whole.
    """
    if _shares_of_weights(request) == 1 and not request.offload:
        return 0.0
    each = min(request.held_bytes, 2 if request.autocast else 4)
    blocks = each * 2.0 * shape.block
    if request.bits < 16:
        quantizable = shape.quantizable / max(shape.layers, 1)
        quantized = quantized_bytes(request, shape) / max(shape.layers, 1) if request.shards_quantized else 0.0
        blocks = 2.0 * (each * max(shape.block - quantizable, 0.0) + quantized)
    return blocks + each * max(shape.head, shape.hidden * shape.vocabulary)


def reference(request: PlanRequest, shape: Shape) -> float:
    """The reference model: none with adapters (their base is the reference) or when it is scored before training."""
    if request.lora_rank or (request.precomputed and request.parallel != "fsdp2"):
        return 0.0
    return weights(request, shape)


def trainable(request: PlanRequest, shape: Shape) -> tuple[float, float]:
    """The number of trainable weights and the bytes of one.

    PEFT makes adapters in float32; TRL then has them in bfloat16 on a quantized model, and in the base's type under ZeRO-3.
    DeepSpeed's mixed precision casts adapters as it casts all weights.
    """
    if not request.lora_rank:
        return shape.weights, request.held_bytes
    if request.bits < 16:
        each = 2
    elif request.parallel == "zero3" or (request.parallel.startswith("zero") and request.autocast):
        each = request.held_bytes
    else:
        each = 4
    return shape.lora_weights(request.lora_rank, request.lora_targets), each


def adapters(request: PlanRequest, shape: Shape) -> float:
    """LoRA's weights."""
    count, each = trainable(request, shape)
    return count * each / _shares_of_weights(request) if request.lora_rank else 0.0


def optimizer(request: PlanRequest, shape: Shape) -> float:
    """The optimizer's moments, and ZeRO's float32 copy of the weights; one shard with ZeRO and FSDP2, none when offloaded.

    DeepSpeed keeps that copy without mixed precision too, in each stage (0.19.8, as tests/plan/test_plan.py measures).
    """
    if request.offload:
        return 0.0
    count, each = trainable(request, shape)
    kept = OPTIMIZER_BYTES.get(request.optim, 2 * each)
    if request.parallel.startswith("zero"):
        kept = OPTIMIZER_BYTES.get(request.optim, 8.0) + 4.0
    shares = request.gpus if request.parallel in ("zero1", "zero2", "zero3", "fsdp2") else 1
    return count * kept / shares


def gradients(request: PlanRequest, shape: Shape) -> float:
    """Gradients of the trainable weights, in their type; one shard with ZeRO-2, ZeRO-3 and FSDP2."""
    count, each = trainable(request, shape)
    return count * each / (request.gpus if request.parallel in ("zero2", "zero3", "fsdp2") else 1)


def buckets(request: PlanRequest, shape: Shape) -> float:
    """DDP's buckets: a second copy of the gradients, held from the first step on."""
    count, each = trainable(request, shape)
    return count * each if request.parallel == "ddp" and request.gpus > 1 else 0.0


def rows(request: PlanRequest) -> tuple[int, float, float]:
    """Rows, tokens per row, and scored tokens of a micro-batch whose rows all have the maximum length L.

    Padded: 2B rows of L tokens. Packed: one row, in which a pair takes `p + 2 (L − p)` tokens, p of them prompt.
    """
    length, prompt = request.max_length, request.prompt_share * request.max_length
    scored = 2 * request.micro_batch * (length - prompt)
    if request.packed:
        return 1, request.micro_batch * (prompt + 2 * (length - prompt)), scored
    return 2 * request.micro_batch, length, scored


def activations(request: PlanRequest, shape: Shape) -> float:
    """What the policy's forward pass keeps for backward, counted on the architecture itself (`activations.kept_by`).

    With checkpointing, each block keeps only its input, and one block at a time is recomputed.
    """
    block, around = kept_by(
        request.config,
        dtype=_dtype(request),
        autocast=request.autocast,
        lora=request.lora_targets if request.lora_rank else (),
        lora_dtype=torch.bfloat16 if trainable(request, shape)[1] == 2 else torch.float32,
        spares_casts=request.packed,
    )
    count, tokens, _ = rows(request)
    if request.packed:
        a_block, outside = block.packed(tokens) + packed_attention(request, shape), around.packed(tokens)
    else:
        a_block, outside = block.padded(count, tokens), around.padded(count, tokens)
    if not request.checkpointing:
        return shape.layers * a_block + outside
    return shape.layers * count * tokens * shape.hidden * request.held_bytes + a_block + outside


def packed_attention(request: PlanRequest, shape: Shape) -> float:
    """What attention over packed pairs keeps in a block, beside what attention over one plain row keeps.

    Both ways take no mask, and have a second copy of the prompt's keys and values for the rejected answer. Parts of pairs,
    for a CPU or float32, join their outputs in a copy. One variable-length call, for CUDA in half precision, takes keys and
    values as they are, where plain attention repeats them for every head of the queries.
    """
    _, tokens, _ = rows(request)
    prompts = request.micro_batch * request.prompt_share * request.max_length
    if request.device == "cuda" and request.computes_in_half:
        return 2 * 2 * (shape.key_value * (tokens + prompts) - shape.query * tokens)
    return (2 if request.computes_in_half else 4) * shape.query * (2 * prompts + tokens)


def workspace(request: PlanRequest, shape: Shape) -> float:
    """What the backward pass of one block needs: two tensors as wide as the widest layer."""
    count, tokens, _ = rows(request)
    widest = max((max(inside, outside) for _, inside, outside in shape.linears), default=shape.hidden)
    return 2 * count * tokens * widest * (2 if request.computes_in_half else 4)


def head(request: PlanRequest, shape: Shape) -> float:
    """The output head's workspace: tiles of logits, never all logits at once."""
    count, tokens, scored = rows(request)
    positions = scored if request.device == "cuda" or request.packed else count * tokens
    tile = min(positions, HEAD_TOKENS) * min(shape.vocabulary, HEAD_ENTRIES)
    if request.device == "cuda":
        return tile * (2 if request.computes_in_half else 4)
    return tile * 4 * HEAD_COPIES


def head_gradient(request: PlanRequest, shape: Shape) -> float:
    """The head's gradient, accumulated in float32 if the head is trained."""
    return 0.0 if request.lora_rank else 4.0 * shape.hidden * shape.vocabulary


def temporaries(request: PlanRequest, shape: Shape) -> float:
    """What the optimizer's step adds to its state: one tensor of the weights' size, unless fused, paged or in 8 bits."""
    if "fused" in request.optim or "8bit" in request.optim or "paged" in request.optim:
        return 0.0
    count, each = trainable(request, shape)
    return count * each / (request.gpus if request.parallel in ("zero1", "zero2", "zero3", "fsdp2") else 1)


def offloaded(request: PlanRequest, shape: Shape) -> float:
    """What ZeRO-3 holds in the machine's memory, over all of its devices, where it offloads: weights, optimizer, gradients.

    The reference's weights, or a frozen base's, lie there too.
    """
    if not request.offload:
        return 0.0
    count, each = trainable(request, shape)
    whole = quantized_bytes(request, shape) + other_bytes(request, shape)
    beside = whole if request.lora_rank or not request.precomputed else 0.0
    return (OFFLOADED_BYTES + each) * count + beside


def allowance(request: PlanRequest, shape: Shape) -> float:
    """The process itself, beside tensors."""
    return CUDA_BYTES if request.device == "cuda" else CPU_BYTES


Term = Callable[[PlanRequest, Shape], float]
#: Terms by name, grouped by when they are held.
RESIDENT: dict[str, Term] = {
    "weights": weights,
    "reference": reference,
    "adapters": adapters,
    "optimizer": optimizer,
    "gradient buckets": buckets,
    "gathered weights": gathered,
    "process": allowance,
}
FORWARD: dict[str, Term] = {"activations": activations, "logits": head, "workspace": workspace, "head gradient": head_gradient}
BACKWARD: dict[str, Term] = {"gradients": gradients}
STEP: dict[str, Term] = {"gradients": gradients, "optimizer temporaries": temporaries}


def estimate(request: PlanRequest) -> Estimate:
    """Estimates what each device holds, in bytes, from the config alone. No weights are loaded.

    Raises:
        ValueError: LoRA's targets name no layer, transformers has no causal language model for the config, or the model
            cannot be counted without its weights (`activations.kept_by`).
    """
    shape = shape_of(request.config)

    def terms(table: dict[str, Term]) -> dict[str, float]:
        return {name: term(request, shape) for name, term in table.items()}

    resident, forward = terms(RESIDENT), terms(FORWARD)
    if request.accumulation > 1:
        # Gradients of earlier micro-batches are held while the next one runs.
        forward["gradients"] = gradients(request, shape)
    return Estimate(request, shape, resident, forward, terms(BACKWARD), terms(STEP))


def _shares_of_weights(request: PlanRequest) -> int:
    return request.gpus if request.parallel in ("zero3", "fsdp2") else 1


def _dtype(request: PlanRequest) -> torch.dtype:
    return torch.bfloat16 if request.held_bytes == 2 else torch.float32
