"""An arm's training steps, as training runs them: collate, send, forward, backward."""

import gc
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import datasets
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.engine.forward.backends import Choice
from trl_cpo.engine.forward.probing import probe

from .lengths import tokens_of
from .models import CONFIGS, lora, make
from .rows import TRL, Row

OTHER_SHAPES = 2  # batches before the timed ones, of other lengths


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate(("<pad>", "<s>", "</s>", "why", "rain", "no"))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def trainer_of(row: Row, arm: str, device: torch.device) -> Any:
    """The trainer of an arm: DPOTrainer as TRL has it, or ours with clip over a back end."""
    on_gpu = device.type == "cuda"
    options = dict(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=row.pairs,
        max_length=None,
        gradient_checkpointing=True,
        precompute_ref_log_probs=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        bf16=True,
        use_cpu=not on_gpu,
        beta=0.1,
        optim="sgd",
        learning_rate=1e-6,
        logging_steps=1000,
        dataloader_pin_memory=on_gpu,
    )
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_list([{"prompt": "why", "chosen": "rain", "rejected": "no"}] * 8)
    model = make(row.size, quantized=row.training == "qlora", device=device)
    if on_gpu:
        # What follows is the start of a training: the probe and the device's check are among it.
        torch.cuda.reset_peak_memory_stats()
    given: dict[str, Any] = dict(processing_class=_tokenizer(), train_dataset=dataset)
    if row.training == "full":
        # Never run: the scores are made up. Without one, DPOTrainer would load it from a hub.
        given["ref_model"] = make(row.size, quantized=False, device=device, layers=1)
    else:
        model.enable_input_require_grads()
        model = get_peft_model(model, lora())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if arm == TRL:
            trainer = DPOTrainer(model=model, args=DPOConfig(**options), **given)
        else:
            args = CPOConstrainedConfig(**options, constraint="clip", prefix_sharing=True, check_reference=False, narrate=False)
            with patch.object(probe, "choice_for", lambda model: Choice((arm,))):
                trainer = CPOConstrainedTrainer(model=model, args=args, **given)
            assert trainer._sharing.verdict(trainer.model).attention == arm
    trainer.precompute_ref_logps = True  # with the made-up scores
    # As `train` does: the forward runs under autocast.
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    trainer.model.train()
    return trainer


def set_checkpointing(trainer: Any, wanted: bool) -> None:
    """Switches gradient checkpointing on or off, as `train` does: the arguments alone do nothing before it."""
    model = trainer.model
    # Since transformers 5.23 the older name is deprecated.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if wanted:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{kind}_checkpointing_disable")()


def batches_of(row: Row, start: int, count: int) -> list[list[dict]]:
    """Rows of tokens of `count` batches."""
    vocabulary = CONFIGS[row.size].vocab_size
    return [tokens_of(row.lengths(number), vocabulary, seed=number) for number in range(start, start + count)]


def step(trainer: Any, rows: list[dict]) -> None:
    """One micro-batch: collated, sent, forward, backward. The optimizer's part is the same for all arms."""
    batch = trainer.data_collator(rows)
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        batch[name] = torch.tensor([pair[name] for pair in rows])
    batch = trainer._prepare_inputs(batch)
    trainer.model.zero_grad(set_to_none=True)
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model_wrapped, batch)
    loss.backward()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(trainer: Any, batches: list[list[dict]], device: torch.device) -> Iterator[float]:
    """Seconds of each batch, with the device's queue empty before and after."""
    for rows in batches:
        synchronise(device)
        start = time.perf_counter()
        step(trainer, rows)
        synchronise(device)
        yield time.perf_counter() - start


def measure(trainer: Any, row: Row, device: torch.device) -> dict:
    """Seconds a batch at lengths never seen before, and of the same batches once more; and the most memory taken."""
    set_checkpointing(trainer, row.checkpointing)
    for rows in batches_of(row, row.batches, OTHER_SHAPES):
        step(trainer, rows)
    batches = batches_of(row, 0, row.batches)
    held = 0.0
    if device.type == "cuda":
        trainer.model.zero_grad(set_to_none=True)
        synchronise(device)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    new, again = list(timed(trainer, batches, device)), list(timed(trainer, batches, device))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0.0
    found = {"new_s": new, "again_s": again, "held_bytes": held, "peak_bytes": peak}
    return found | kernels(lambda: step(trainer, batches[-1]), device)


def kernels(run: Callable[[], None], device: torch.device, longest: int = 30) -> dict:
    """What the device did in a step that was run before: how long it was busy, and its kernels, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    if device.type != "cuda":
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        synchronise(device)
    totals: dict[str, tuple[float, int]] = {}
    for event in found.profiler.kineto_results.events():
        if str(event.device_type()).endswith("CUDA"):
            seconds, calls = totals.get(event.name(), (0.0, 0))
            totals[event.name()] = seconds + event.duration_ns() / 1e9, calls + 1
    ordered = sorted(totals.items(), key=lambda item: -item[1][0])
    return {
        "busy_s": sum(seconds for seconds, _ in totals.values()),
        "kernels": sum(calls for _, calls in totals.values()),
        "longest": [(name[:120], seconds, calls) for name, (seconds, calls) in ordered[:longest]],
    }


class _Clock(TrainerCallback):
    """When each optimizer step of a training ended, with the device's queue empty."""

    def __init__(self, device: torch.device):
        self.device, self.ends = device, []

    def on_step_end(self, args, state, control, **kwargs):
        synchronise(self.device)
        self.ends.append(time.perf_counter())


def train(trainer: Any, row: Row, device: torch.device, steps: int = 12, first: int = 4) -> dict:
    """Seconds a step of `train()` itself, loader, clipping, optimizer and log among it, after the first ones."""
    rows = [pair for batch in batches_of(row, 50, steps) for pair in batch]
    trainer.train_dataset = datasets.Dataset.from_list(rows)
    trainer.args.max_steps, trainer.args.gradient_checkpointing = steps, row.checkpointing
    clock = _Clock(device)
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    return {"train_step_s": (clock.ends[-1] - clock.ends[first - 1]) / (steps - first)}


def freed() -> None:
    """Gives a trainer's memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
