"""
Kills training with SIGKILL at random moments, resumes it until it is done, and compares it with training left alone.

    python tests/processes/kill_and_resume.py --times 20
    python tests/processes/kill_and_resume.py --times 20 --processes 2

Each time a tiny model is trained under another constraint, in full or with LoRA, with the reference computed as it goes or
beforehand, and killed one to three times: every other first kill comes while a checkpoint is being written (files are then
written slowly, in halves), the others at any moment. After each kill every `checkpoint-*` folder must be whole and none that
was finished may be missing; at the end weights, optimizer, schedule, random states, multiplier, logged metrics and log.jsonl
must be equal, bit for bit. Prints a line a time, and the score; exits with 1 if it is not full.

Training runs in forked children, so that the libraries are imported once; the kill is a real one, of a process group.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for helpers

# isort: split

from helpers import imported  # noqa: F401

# isort: split

import argparse
import io
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.utils import logging

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.engine.resume import checkpoints
from trl_cpo.logs.run_log import RunLog, read_log

from helpers.comparisons import differences, without_timings
from helpers.tiny import make_lora, make_model, make_tokenizer, pairs_dataset, training_options

STEPS, SAVE_STEPS, KEPT = 14, 2, 2
VARIANTS = [
    dict(constraint="lagrangian", epsilon=0.2, dual_lr=0.3, dual_max=5.0),
    dict(constraint="clip", lora=True, precompute_ref_log_probs=True),
    dict(constraint="penalty"),
    dict(constraint="lagrangian", epsilon=0.2, dual_lr=0.3, dual_max=5.0, precompute_ref_log_probs=True, balance_tokens=True),
    dict(constraint="lagrangian", epsilon=0.2, dual_lr=0.3, dual_max=5.0, lora=True, eval_strategy="steps", eval_steps=4),
    dict(constraint="softplus", lora=True),
    dict(constraint="none", lora=True, precompute_ref_log_probs=True, eval_strategy="epoch"),
    dict(constraint="inverse_logp", sync_ref_model=True, ref_model_sync_steps=3),
]


class Trace:
    """One line a noteworthy moment, for the process that kills; written at once, by the first process alone."""

    def __init__(self, file: Path, rank: int):
        self._file, self._rank = file, rank

    def __call__(self, word: str) -> None:
        if self._rank == 0:
            with self._file.open("a") as lines:
                lines.write(word + "\n")


def slow_writes(trace: Trace) -> None:
    """Has checkpoints' files written in halves, with a pause between, and a pause before each rename."""

    def write(data: bytes, path) -> None:
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            trace("writing")
            time.sleep(0.02)
            file.write(data[len(data) // 2 :])

    save, save_file, rename, publish = torch.save, safetensors.torch.save_file, os.rename, checkpoints.publish

    def slow_save(obj, path, *args, **kwargs):
        buffer = io.BytesIO()
        save(obj, buffer, *args, **kwargs)
        write(buffer.getvalue(), path)

    def slow_rename(source, target):
        trace("writing")
        time.sleep(0.02)
        rename(source, target)
        trace("writing")
        time.sleep(0.02)

    def traced_publish(run_dir, name):
        publish(run_dir, name)
        trace(f"finished {name}")

    torch.save, os.rename, checkpoints.publish = slow_save, slow_rename, traced_publish
    import peft.utils.save_and_load  # noqa: F401
    import transformers.modeling_utils as modeling

    def slow_safetensors(tensors, path, metadata=None):
        write(safetensors.torch.save(tensors, metadata), path)

    modeling.safe_save_file = slow_safetensors
    sys.modules["peft.peft_model"].safe_save_file = slow_safetensors
    assert save_file is not slow_safetensors


class Steps(TrainerCallback):
    def __init__(self, trace: Trace):
        self._trace = trace

    def on_train_begin(self, args, state, control, **kwargs):
        self._trace(f"begun at {state.global_step}")

    def on_step_begin(self, args, state, control, **kwargs):
        self._trace("step")


def train(folder: Path, model: str, variant: dict, rank: int, trace: Trace) -> None:
    """One training, resumed where there is anything to resume from; what `trl-cpo train` does, on a tiny model."""
    slow_writes(trace)
    options = {k: v for k, v in variant.items() if k != "lora"}
    policy = AutoModelForCausalLM.from_pretrained(model)
    arguments = training_options(
        folder / "run",
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        logging_steps=3,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        save_total_limit=KEPT,
        lr_scheduler_type="cosine",
        gamma=0.5,
        dataloader_num_workers=0,
    )
    torch.manual_seed(0)
    trainer = CPOConstrainedTrainer(
        model=policy,
        args=CPOConstrainedConfig(**{**arguments, **options}),
        processing_class=make_tokenizer(),
        train_dataset=pairs_dataset(11),
        eval_dataset=pairs_dataset(3, seed=5) if "eval_strategy" in options else None,
        peft_config=make_lora() if variant.get("lora") else None,
        callbacks=[Steps(trace), RunLog(folder / "log.jsonl")],
    )
    if os.environ.get("WORLD_SIZE", "1") != str(trainer.accelerator.num_processes):
        raise RuntimeError("This is not as many processes as were asked for.")
    trainer.train(resume_from_checkpoint=bool(checkpoints.newest_checkpoint(folder / "run")))
    trainer.save_model(str(folder / "final"))
    trainer.accelerator.wait_for_everyone()
    trace("done")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(folder: Path, model: str, variant: dict, processes: int) -> tuple[int, list[int]]:
    """Forks a training of so many processes; gives their group and their ids."""
    folder.mkdir(exist_ok=True)
    port, group, children = free_port(), 0, []
    for rank in range(processes):
        child = os.fork()
        if child:
            group = group or child
            os.setpgid(child, group)
            children.append(child)
            continue
        status = 1
        try:
            os.setpgid(0, group)
            output = os.open(folder / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if processes > 1:
                os.environ.update(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(processes),
                    LOCAL_WORLD_SIZE=str(processes),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                )
            warnings.simplefilter("ignore")
            train(folder, model, variant, rank, Trace(folder / "trace", rank))
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    return group, children


def wait(children: list[int], seconds: float) -> list[int] | None:
    """The exit codes once all have ended (negative: by a signal), or None if that takes longer than `seconds`."""
    end, codes = time.monotonic() + seconds, {}
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.002)
    return list(codes.values())


def traced(folder: Path) -> list[str]:
    file = folder / "trace"
    return file.read_text().splitlines() if file.exists() else []


def kill(group: int, children: list[int]) -> None:
    os.killpg(group, signal.SIGKILL)
    for child in children:
        with suppress(ChildProcessError):  # one of several may have ended a moment before
            os.waitpid(child, 0)


def say_why(folder: Path) -> str:
    return "".join(file.read_text()[-1500:] for file in sorted(folder.glob("output-*.txt")))


def uninterrupted(folder: Path, model: str, variant: dict, processes: int) -> float:
    """Trains without a kill; gives the seconds from the start of training to its end."""
    _, children = start(folder, model, variant, processes)
    while not any(word.startswith("begun") for word in traced(folder)):
        if wait(children, 0) is not None:
            raise RuntimeError(f"Training ended before it began:\n{say_why(folder)}")
        time.sleep(0.005)
    begun = time.monotonic()
    if any(wait(children, 300) or [1]):
        raise RuntimeError(f"Uninterrupted training failed:\n{say_why(folder)}")
    return time.monotonic() - begun


def interrupt(folder: Path, model: str, variant: dict, processes: int, rng: random.Random, moment, seconds: float) -> bool:
    """Starts training and kills it at a moment, "writing" or "any"; False if it was done before."""
    begun = len(traced(folder))
    group, children = start(folder, model, variant, processes)
    if moment == "writing":
        after = rng.randrange(45)  # of the 10 or so that each checkpoint has, over the first few checkpoints

        def ready():
            return traced(folder)[begun:].count("writing") > after

        pause = rng.uniform(0, 0.02)
    else:

        def ready():
            return any(word.startswith("begun") for word in traced(folder)[begun:])

        pause = rng.uniform(0, seconds)
    end = time.monotonic() + 300
    while not ready():
        if wait(children, 0) is not None or time.monotonic() > end:
            break
        time.sleep(0.001)
    else:
        codes = wait(children, pause)
        if codes is None:
            kill(group, children)
            return True
        if any(codes):
            raise RuntimeError(f"Training failed by itself:\n{say_why(folder)}")
        return False
    if "done" not in traced(folder):
        raise RuntimeError(f"Training failed by itself:\n{say_why(folder)}")
    return False


def check_after_kill(folder: Path) -> None:
    """Every checkpoint folder is whole, and the newest finished ones, as many as are kept, are there."""
    run = folder / "run"
    there = {path.name for path in run.glob("checkpoint-*")}
    for name in there:
        fault = checkpoints.fault_of(run / name)
        assert fault is None, f"{name} is not whole: {fault}"
    finished = {word.removeprefix("finished ") for word in traced(folder) if word.startswith("finished ")}
    # One may be finished and killed before it was said.
    newest = sorted(finished | there, key=lambda name: int(name.split("-")[1]))[-KEPT:]
    lost = set(newest) - there
    assert not lost, f"lost {sorted(lost)}; there are {sorted(there)}"


def check_resumed(folder: Path, newest: Path | None, before: int) -> None:
    """Training began at the newest whole checkpoint, wherever a kill left it."""
    begun = [int(word.split()[-1]) for word in traced(folder)[before:] if word.startswith("begun at ")]
    expected = 0 if newest is None else int(newest.name.split("-")[1])
    assert begun == [expected], f"resumed from {begun} and not from {expected}"


def check_equal(folder: Path, alone: Path) -> None:
    """The interrupted run ended as the one left alone did: the final model, the last checkpoints, the log."""
    for name in ("final", *(path.name for path in alone.glob("run/checkpoint-*"))):
        inside = "" if name == "final" else "run"
        different = differences(folder / inside / name, alone / inside / name)
        assert not different, f"{name}: {', '.join(different)} differ"
    logs = [[without_timings(line) for line in read_log(where / "log.jsonl")] for where in (folder, alone)]
    assert logs[0] == logs[1], "log.jsonl differs"
    assert len(logs[0]) > STEPS // 3 and not (folder / "run" / checkpoints.UNFINISHED).exists()


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill training at random, resume it, compare.")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", type=int, help="use this variant alone")
    parser.add_argument("--keep", help="work in this folder, and leave it")
    options = parser.parse_args()
    logging.set_verbosity_error()
    rng, started, passed, kills, while_writing = random.Random(options.seed), time.monotonic(), 0, 0, 0
    work = Path(options.keep or tempfile.mkdtemp(prefix="kill-and-resume-"))
    work.mkdir(parents=True, exist_ok=True)
    model = str(work / "model")
    make_model(num_hidden_layers=1).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    alone: dict[int, float] = {}
    for number in range(options.times):
        index = number % len(VARIANTS) if options.variant is None else options.variant
        variant, folder, control = VARIANTS[index], work / f"time-{number}", work / f"alone-{index}"
        name = ", ".join(f"{k}={v}" for k, v in variant.items())
        killed = 0
        try:
            if index not in alone:
                alone[index] = uninterrupted(control, model, variant, options.processes)
            wanted, attempts = rng.randint(1, 3), 0
            while killed < wanted and attempts < 10:
                attempts += 1
                moment = "writing" if killed == 0 and number % 2 == 0 else "any"
                newest, before = checkpoints.newest_checkpoint(folder / "run"), len(traced(folder))
                if not interrupt(folder, model, variant, options.processes, rng, moment, alone[index]):
                    if killed:
                        break
                    shutil.rmtree(folder)  # done before it could be killed: again, from the start
                    continue
                killed += 1
                while_writing += (folder / "run" / checkpoints.UNFINISHED).exists()
                check_after_kill(folder)
                if any(word.startswith("begun") for word in traced(folder)[before:]):
                    check_resumed(folder, newest, before)
            assert killed, "training ended before it could be killed"
            newest, before = checkpoints.newest_checkpoint(folder / "run"), len(traced(folder))
            _, children = start(folder, model, variant, options.processes)
            codes = wait(children, 300)
            assert codes is not None and not any(codes), f"the resumed training failed:\n{say_why(folder)}"
            check_resumed(folder, newest, before)
            check_equal(folder, control)
        except (AssertionError, RuntimeError) as error:
            print(f"{number + 1:>3}  FAILED after {killed} kills  {name}: {error}", flush=True)
        else:
            passed += 1
            print(f"{number + 1:>3}  equal after {killed} kills  {name}", flush=True)
            if not options.keep:
                shutil.rmtree(folder)
        kills += killed
    if not options.keep and passed == options.times:
        shutil.rmtree(work)
    print(
        f"{passed} of {options.times} equal to training left alone, bit for bit: {kills} kills of {options.processes} "
        f"process{'es' * (options.processes > 1)}, {while_writing} of them with a checkpoint half-written, "
        f"{time.monotonic() - started:.0f} s"
    )
    return 0 if passed == options.times else 1


if __name__ == "__main__":
    sys.exit(main())
