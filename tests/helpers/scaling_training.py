"""Short trainings of test_scaling.py in a process that was launched: with save, resume and evaluation."""

import gc
import os
from pathlib import Path

from accelerate.state import AcceleratorState
from accelerate.utils import is_peft_model
from datasets import load_dataset
from transformers import AutoModelForCausalLM, set_seed

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer

from helpers.parallel_runs import forget_the_launchers_choices, nf4, wrapping
from helpers.tiny import make_lora, make_tokenizer, training_options

# Plain gradient descent without clipping: its weights tell the size of the gradients, which Adam hides.
OPTIONS = dict(optim="sgd", learning_rate=0.01, max_grad_norm=0.0, gamma=0.3, max_steps=4)

#: Metrics of the price, whose samples depend on how prompts are dealt to processes.
PRICE = tuple(f"eval_cpo/{name}" for name in ("kl", "repetition", "answer", "chosen_nll"))


def data_of(job: dict, place: Path):
    # A cache of its own: TRL keeps precomputed log-probabilities beside the data and would take them up again.
    return load_dataset("json", data_files=job["data"], cache_dir=str(place / "cache"))


def evaluate(job: dict, trainer: CPOConstrainedTrainer, place: Path) -> dict:
    """On the evaluation set; an adapter also on a new one, whose reference, the model without it, is not precomputed yet."""
    evaluated = trainer.evaluate()
    if not is_peft_model(trainer.model):
        return evaluated
    new = data_of(job, place)["train"].select(range(5))
    return {**evaluated, **trainer.evaluate(new, metric_key_prefix="new")}


def make_trainer(job: dict, run: dict, place: Path, **more) -> CPOConstrainedTrainer:
    data = data_of(job, place)
    accumulate = run.get("accumulate", 1)
    if "rounds" in run:  # micro-batches of a step over all processes
        accumulate = run["rounds"] // int(os.environ.get("WORLD_SIZE", 1))
    options = {
        **OPTIONS,
        "per_device_train_batch_size": job["batch"] // accumulate,
        "per_device_eval_batch_size": job["batch"],
        "gradient_accumulation_steps": accumulate,
        **run.get("options", {}),
        **more,
    }
    if "deepspeed" in options:
        forget_the_launchers_choices()
    AcceleratorState._reset_state()
    set_seed(0)
    reference = run.get("ref_model")
    args = CPOConstrainedConfig(**training_options(place, **options))
    return CPOConstrainedTrainer(
        model=job["model"],
        ref_model=AutoModelForCausalLM.from_pretrained(reference) if reference else None,
        args=args,
        processing_class=make_tokenizer(),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        quantization_config=nf4() if run.get("nf4") else None,
        peft_config=make_lora() if run.get("lora") else None,
    )


def in_double(trainer: CPOConstrainedTrainer) -> None:
    """The same training in double precision: the weights drawn in float32, everything computed from them not."""
    trainer.model.double()
    if trainer.ref_model is not None:
        trainer.ref_model.double()


def deepspeed_of(engine) -> dict:
    """What a DeepSpeed engine was configured with; of other wrappers that they have none of it."""
    if not hasattr(engine, "zero_reduce_bucket_size"):
        return {"offloaded": False, "bucket": None}
    return {
        "offloaded": "cpu" in str(getattr(engine.zero_offload_param(), "device", "none")),
        "bucket": engine.zero_reduce_bucket_size(),
    }


def seen_of(trainer: CPOConstrainedTrainer, evaluated: dict, trained: Path, since: int = 0) -> dict:
    trainer.save_model(str(trained))
    steps = [record for record in trainer.state.log_history if "loss" in record and record["step"] > since]
    gc.collect()
    return {
        "logs": [{key: value for key, value in step.items() if isinstance(value, float)} for step in steps],
        # Over pairs: the other numbers of an evaluation count the pairs that fill up the last batch.
        "evaluated": {key: value for key, value in evaluated.items() if "cpo/" in key and not key.startswith(PRICE)},
        "price": {key: value for key, value in evaluated.items() if key.startswith(PRICE)},
        "trained": str(trained),
        **deepspeed_of(trainer.model_wrapped),
        **wrapping(trainer),
    }


def train(job: dict, run: dict) -> list[dict]:
    """One training and its evaluation; with `resume` a second one, gone on with from the checkpoint of the second step.

    Args:
        job: folder; model; data, files by split; batch, of a process.
        run: name; lora; nf4; ref_model, a folder; options of the configuration; accumulate, how many micro-batches of a
            process make a step, or rounds, how many of all processes; double, in float64; resume.
    """
    place = Path(job["folder"]) / run["name"]
    saves = dict(save_strategy="steps", save_steps=2) if run.get("resume") else {}
    trainer = make_trainer(job, run, place, **saves)
    if run.get("double"):
        in_double(trainer)
    trainer.train()
    seen = [seen_of(trainer, evaluate(job, trainer, place), place / "trained")]
    if run.get("resume"):
        del trainer
        gc.collect()
        trainer = make_trainer(job, run, place)
        trainer.train(resume_from_checkpoint=str(place / "checkpoint-2"))
        seen.append(seen_of(trainer, evaluate(job, trainer, place), place / "resumed", since=2))
    return seen
