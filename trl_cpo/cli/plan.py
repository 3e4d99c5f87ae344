"""`trl-cpo plan`: estimates what a run holds on each GPU, and whether it fits, before anything is loaded."""

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path

from ..quoting import as_json
from .errors import UserError
from .imports import fast_imports
from .needs import given_options, is_true
from .recipe_files import read_config

HELP = "Estimate a run's memory on each GPU, and whether it fits, from the model's config alone."
PASSES_ON = True

_KINDS = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "trl-cpo plan [--model M] [--config RECIPE] [--gpus N] [--memory 24GB] [any option of trl-cpo train]"
    parser.epilog = (
        "trl-cpo plan --config hh-rlhf-qlora-24gb --memory 24GB\n"
        "trl-cpo plan --model path/to/model --gpus 8 --parallel zero3 --memory 80GB --max_length 2048\n"
        "\nNo weights are loaded; of a model on the hub, only the config is fetched. Accuracy of the estimates: docs/plan.md"
    )
    parser.add_argument("--model", metavar="M", help="hub name or folder with a config.json (default: the recipe's)")
    parser.add_argument("--config", metavar="RECIPE", help="a YAML file, or a recipe's name (trl-cpo recipes)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="devices that share the work (default: 1)")
    parser.add_argument("--parallel", choices=_KINDS, help="how they share it (default: ddp)")
    parser.add_argument("--offload", action="store_true", help="ZeRO-3 with weights and optimizer in CPU memory")
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="memory of each device, such as 24GB: checks whether the run fits, and finds what makes it fit",
    )
    parser.add_argument(
        "--prompt_share",
        type=float,
        default=0.5,
        metavar="P",
        help="the prompt's share of the longest row, 0 to 1 (default: 0.5); the packed forward computes it once",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(options: argparse.Namespace) -> int:
    usage = "Usage: trl-cpo plan --help"
    if options.gpus < 1:
        raise UserError(f"--gpus must be 1 or more; got {options.gpus}.\n{usage}")
    if not 0.0 <= options.prompt_share <= 1.0:
        raise UserError(f"--prompt_share must lie between 0 and 1; got {options.prompt_share:g}.\n{usage}")
    # The machine that plans may have no GPU, where bf16 would be refused: parse as for a CPU.
    device = "cpu" if _for_cpu(options) else "cuda"
    with fast_imports():
        from ..plan import cheapest, estimate, quicker
        from ..plan.size import parse_size
        from ..plan.text import as_document, as_text
        from .options import parse_run

    try:
        memory = None if options.memory is None else parse_size(options.memory)
    except ValueError as error:
        raise UserError(f"--memory {error}\n{usage}") from None
    # Some libraries print to stdout, which is for the answer alone.
    with redirect_stdout(sys.stderr):
        _, args, policy = parse_run([*options.passed_on, "--use_cpu", "True"], options.config, "trl-cpo plan")
        try:
            request = _request(options, args, policy, device)
            found = estimate(request)
            remedy = cheapest(request, memory) if memory is not None and found.peak > memory else None
            better = quicker(request, memory) if memory is not None and found.peak <= memory else []
        except ValueError as error:
            raise UserError(f"{error}\n{usage}") from error
    told = found, memory, remedy, better
    print(as_json(as_document(*told)) if options.json else as_text(*told))
    return 0 if memory is None or found.peak <= memory else 1


def _for_cpu(options: argparse.Namespace) -> bool:
    values = read_config(options.config) if options.config else {}
    return is_true({**values, **given_options(options.passed_on)}.get("use_cpu"))


def _request(options: argparse.Namespace, args, policy, device: str):
    from ..plan import PlanRequest
    from ..plan.shape import default_targets

    model = options.model or policy.model_name_or_path
    kind = options.parallel or ("ddp" if options.gpus > 1 else "single")
    if options.offload and kind != "zero3":
        raise UserError(f"--offload needs --parallel zero3; got {kind}.\nUsage: trl-cpo plan --help")
    bits = 4 if policy.load_in_4bit else 8 if policy.load_in_8bit else 16
    packed = args.prefix_sharing if args.prefix_sharing is not None else args.constraint != "none"
    if args.tokens_per_step is not None:
        raise UserError(
            "plan needs the number of pairs in a micro-batch, which --tokens_per_step does not fix.\nGive it instead: trl-cpo "
            "plan --per_device_train_batch_size N …"
        )
    config, targets = _config(model, args, policy), policy.lora_target_modules
    if policy.use_peft and not targets:
        targets = default_targets(config.model_type)
    return PlanRequest(
        config=config,
        gpus=options.gpus,
        parallel="single" if options.gpus == 1 and kind == "ddp" else kind,
        offload=options.offload,
        device=device,
        weight_bytes=2 if policy.dtype in ("bfloat16", "float16") else 4,
        bits=bits,
        nested=bool(policy.use_bnb_nested_quant),
        quant_storage=policy.bnb_4bit_quant_storage or "uint8",
        autocast=bool(args.bf16 or args.fp16),
        lora_rank=policy.lora_r if policy.use_peft else 0,
        lora_targets=targets if isinstance(targets, str) else tuple(targets or ()),
        precomputed=bool(args.precompute_ref_log_probs),
        checkpointing=bool(args.gradient_checkpointing),
        packed=bool(packed) and not args.torch_compile,
        micro_batch=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        max_length=args.max_length or 1024,
        prompt_share=options.prompt_share,
        optim=str(getattr(args.optim, "value", args.optim)),
    )


def _config(model: str, args, policy):
    from ..data import models
    from ..plan.known import known_config

    # Another revision may be another model.
    known = known_config(model) if policy.model_revision in (None, "main") and not Path(model).exists() else None
    if known is not None:
        return known
    try:
        return models.read_config(
            models.source_of(model), revision=policy.model_revision, trust_remote_code=bool(args.trust_remote_code)
        )
    except models.ModelError as error:
        raise UserError(f"{error}\nAll options: trl-cpo plan --help") from error
