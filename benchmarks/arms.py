"""The arms of the benchmark: a step of DPOTrainer, of ours padded and packed, and a stand-in for the release's step."""

import dataclasses
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo._trl.datasets import of_tokens_alone
from trl_cpo.data.loading import load_pairs, to_conversational


@dataclass(frozen=True)
class Setting:
    """What one case trains, and on what. Picklable, so that memory can be measured in a fresh process."""

    model: str
    pairs: str = "demo-answers"
    lora: bool = True
    batch: int = 8
    max_length: int = 512
    batches: int = 3
    made_up: tuple[int, int] | None = None  # synthetic pairs: prompt : answer, as parts of max_length
    checkpointing: bool = False
    precomputed: bool = False
    forward_only: bool = False
    padded_tokens: int | None = None  # use only batches that DPOTrainer pads to at most this many tokens


def made_up_tokens(setting: Setting, count: int) -> list[dict[str, list[int]]]:
    """`count` pairs of random tokens, all of one length, in the format of DPOTrainer's collator."""
    prompt, answer = (setting.max_length * part // sum(setting.made_up) for part in setting.made_up)
    generator = torch.Generator().manual_seed(0)

    def tokens(length):
        return torch.randint(5, 390, (length,), generator=generator).tolist()

    return [{"prompt_ids": tokens(prompt), "chosen_ids": tokens(answer), "rejected_ids": tokens(answer)} for _ in range(count)]


def dataset_of(setting: Setting, count: int):
    """`count` pairs of the setting's source in TRL's format, shuffled, repeated if there are fewer."""
    pairs, _ = to_conversational(load_pairs(setting.pairs, "train"))
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    repeated = (order * (count // len(order) + 1))[:count]
    return pairs.select(repeated)


def trainer_of(setting: Setting, arm: str, count: int | None = None):
    """The trainer of an arm: "dpo" (TRL's), "padded" or "packed" (ours, constraint clip)."""
    import datasets

    on_gpu = torch.cuda.is_available()
    options = dict(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=setting.batch,
        max_length=setting.max_length,
        gradient_checkpointing=setting.checkpointing,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        use_cpu=not on_gpu,
        beta=0.1,
        dataloader_pin_memory=on_gpu,
        precompute_ref_log_probs=False,
    )
    if arm == "dpo":
        trainer_class, args = DPOTrainer, DPOConfig(**options)
    else:
        trainer_class = CPOConstrainedTrainer
        args = CPOConstrainedConfig(
            **options, constraint="clip", prefix_sharing=arm == "packed", check_reference=not setting.precomputed
        )  # the synthetic references do not match the policy
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(setting.model)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if setting.lora else None
    # More pairs than needed: DPOTrainer drops those whose prompt alone is too long, and some batches are skipped.
    spare = setting.batches + 1 if setting.padded_tokens is None else 40
    count = count or setting.batch * (setting.batches + spare)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_class(
            model=AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32),
            args=args,
            processing_class=tokenizer,
            peft_config=lora,
            train_dataset=dataset_of(setting, count),
        )
    trainer.model.train()
    if setting.checkpointing:
        switch_on_checkpointing(trainer)
    return trainer


def switch_on_checkpointing(trainer) -> None:
    """Switches gradient checkpointing on, as `train` does: the benchmark never calls `train`, and arguments alone do nothing.

    With LoRA, DPOTrainer's constructor makes the inputs require gradients.
    """
    model = trainer.model
    # Since transformers 5.23 the older name is deprecated.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(trainer.args.gradient_checkpointing_kwargs)


def batches_of(trainer, setting: Setting) -> list[dict[str, torch.Tensor]]:
    """The collated batches that every arm runs, with synthetic precomputed references if the setting asks for them."""
    if setting.made_up is not None:
        rows = made_up_tokens(setting, setting.batch * setting.batches)
    else:
        rows = trainer.train_dataset
    batches, collator = [], of_tokens_alone(trainer.data_collator)  # TRL's arm takes no plan
    for start in range(0, len(rows) - setting.batch + 1, setting.batch):
        batch = collator([rows[i] for i in range(start, start + setting.batch)])
        if setting.padded_tokens is None or batch["input_ids"].numel() <= setting.padded_tokens:
            batches.append(batch)
        if len(batches) == setting.batches:
            break
    else:
        raise ValueError(
            f"found {len(batches)} of {setting.batches} batches of at most {setting.padded_tokens} tokens; lower "
            "--batches or --max_length"
        )
    for batch in batches:
        if setting.precomputed:
            batch["ref_chosen_logps"] = torch.full((setting.batch,), -50.0)
            batch["ref_rejected_logps"] = torch.full((setting.batch,), -40.0)
    device = trainer.accelerator.device
    return [{name: value.to(device) for name, value in batch.items()} for batch in batches]


def step_of(trainer, setting: Setting) -> Callable[[dict[str, Any]], Any]:
    """A function that computes a trainer's loss and gradients on one batch.

    The optimizer's step is left out: it is the same for all arms.
    """
    trainer.precompute_ref_logps = setting.precomputed

    def step(batch):
        with trainer.compute_loss_context_manager():
            if setting.forward_only:
                with torch.no_grad():
                    return trainer.compute_loss(trainer.model, dict(batch))
            trainer.model.zero_grad(set_to_none=True)
            loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        return loss

    return step


def reference_pass_of(trainer) -> Callable[[dict[str, Any]], Any]:
    """A function that computes the reference's log-probabilities on one batch, as a precompute pass does."""
    return lambda batch: trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)


def release_step_of(trainer) -> Callable[[dict[str, Any]], Any]:
    """A stand-in for a step of the authors' release, written for this benchmark.

    Like the release, it computes full-vocabulary logits at every position of policy and reference, their log-softmax, and
    at every step a cross-entropy on the chosen answers, even if unused. The loss is that of the clip target, on means.
    """
    model, beta = trainer.model, trainer.beta

    def log_probs(network, batch):
        logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        tokens = batch["input_ids"][:, 1:]
        mask = batch["completion_mask"][:, 1:]
        values = logits.float().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        return (values * mask).sum(1) / mask.sum(1).clamp(min=1), logits, tokens, mask

    def reference(batch):
        with torch.no_grad():
            if trainer.ref_model is not None:
                return log_probs(trainer.ref_model, batch)[0]
            with model.disable_adapter():
                return log_probs(model, batch)[0]

    def step(batch):
        model.zero_grad(set_to_none=True)
        policy, logits, tokens, mask = log_probs(model, batch)
        chosen, rejected = policy.chunk(2)
        ref_chosen, ref_rejected = reference(batch).chunk(2)
        labels = tokens.masked_fill(mask == 0, -100)
        half = len(logits) // 2
        unused = F.cross_entropy(logits[:half].flatten(0, 1), labels[:half].flatten(), ignore_index=-100)
        target = (ref_chosen - ref_rejected).clamp(min=0)
        loss = -F.logsigmoid(beta * (chosen - rejected - target)).mean() + 0.0 * unused
        loss.backward()
        return loss

    return step


def reduced(setting: Setting, **changes) -> Setting:
    """The setting with some fields changed."""
    return dataclasses.replace(setting, **changes)
