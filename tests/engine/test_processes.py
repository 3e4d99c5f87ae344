"""Processes that disagree stop at the start, a dead one ends the job, and what cannot be sharded is refused."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from peft import LoraConfig

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.engine import processes as parallel
from trl_cpo.engine import shutdown

from helpers.paths import PROCESSES
from helpers.tiny import make_model, make_tokenizer, pair_rows, pairs_dataset, training_options

SCRIPT = PROCESSES / "train_together.py"


def facts(tmp_path, *, rows=None, configs=None, **options):
    args = CPOConstrainedConfig(**training_options(tmp_path, **options))
    data = Dataset.from_list(pair_rows(50) if rows is None else rows)
    return parallel.facts_of(args, configs=configs or {}, datasets={"train_dataset": data, "eval_dataset": None})


def told(*sides, hosts=("a", "a", "a")):
    return parallel.disagreement(list(hosts[: len(sides)]), list(sides))


def test_processes_that_agree_are_left_alone(tmp_path):
    # In a file or in memory, the same rows.
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(50)))
    ours = facts(tmp_path, run_name="a")
    args = CPOConstrainedConfig(**training_options(tmp_path, run_name="b", dataloader_num_workers=2))
    data = Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache"))
    theirs = parallel.facts_of(args, configs={}, datasets={"train_dataset": data, "eval_dataset": None})
    assert told(ours, theirs) is None


@pytest.mark.parametrize(
    "options, named",
    [
        ({"beta": 0.2}, "args.beta: 0.5 on processes 0, 2; 0.2 on process 1"),
        ({"constraint": "clip"}, "args.constraint: 'none' on processes 0, 2; 'clip' on process 1"),
        ({"seed": 4}, "args.seed: 3 on processes 0, 2; 4 on process 1"),
        ({"per_device_train_batch_size": 2}, "args.per_device_train_batch_size"),
        ({"loss_type": ["hinge"]}, """args.loss_type: "['sigmoid']" on processes 0, 2; "['hinge']" on process 1"""),
        ({"model_init_kwargs": {"dtype": "float64"}}, "args.model_init_kwargs.dtype: 'missing' on processes 0, 2"),
        ({"tmp_path": "elsewhere"}, "args.output_dir"),
    ],
)
def test_a_setting_that_differs_is_named(tmp_path, options, named):
    ours = facts(tmp_path)
    message = told(ours, facts(**{"tmp_path": tmp_path, **options}), ours)
    assert named in message and "Start every process with the same script" in message


@pytest.mark.parametrize("place", [0, 19, 49])
def test_data_that_differs_is_named(tmp_path, place):
    rows = pair_rows(50)
    picked = sorted({round(i * 49 / 31) for i in range(32)})
    assert parallel.SAMPLED_ROWS == 32 and place in picked
    changed = [*rows[:place], {**rows[place], "rejected": " something else"}, *rows[place + 1 :]]
    ours, theirs = facts(tmp_path, rows=rows), facts(tmp_path, rows=changed)
    message = told(ours, theirs)
    assert "train_dataset.32 rows" in message
    assert ("first row" in message) == (place == 0) and ("last row" in message) == (place == 49)
    # Rows in another order are other data.
    assert "train_dataset.32 rows" in told(ours, facts(tmp_path, rows=rows[::-1]))
    assert "train_dataset.rows: 50 on process 0; 49 on process 1" in told(ours, facts(tmp_path, rows=rows[1:]))
    more = [{**row, "score": 1} for row in rows]
    assert "train_dataset.columns" in told(ours, facts(tmp_path, rows=more))


def test_of_a_stream_only_the_columns_are_taken(tmp_path):
    def never():
        raise AssertionError("a row was read")
        yield

    args = CPOConstrainedConfig(**training_options(tmp_path))
    sets = {"train_dataset": IterableDataset.from_generator(never), "eval_dataset": {"a": pairs_dataset(3)}}
    found = parallel.facts_of(args, configs={}, datasets=sets)
    assert found["train_dataset.type"] == "IterableDataset" and found["eval_dataset['a'].rows"] == 3
    assert not any("row" in key for key in found if key.startswith("train_dataset"))


def test_models_adapters_and_versions_are_compared_and_paths_are_not(tmp_path):
    def with_(config, adapter):
        return facts(tmp_path, configs={"model": lambda: config, "peft_config": adapter})

    small, other = make_model().config, make_model(num_attention_heads=2).config
    ours = with_(small, LoraConfig(r=4, target_modules=["v_proj", "q_proj"]))
    moved = make_model().config
    moved._name_or_path = "/another/machine"
    assert told(ours, with_(moved, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))) is None
    message = told(ours, with_(other, LoraConfig(r=8, target_modules=["q_proj", "v_proj"])), hosts=("north", "south"))
    assert "model.num_attention_heads: 4 on process 0 (north); 2 on process 1 (south)" in message
    assert "peft_config.r: 4 on process 0 (north); 8 on process 1 (south)" in message
    assert "on process 0; '1.0' on process 1" in told(ours, {**ours, "version of torch": "1.0"})


def test_a_fact_that_cannot_be_had_does_not_stop_a_process_alone(tmp_path):
    """It would leave the others waiting for it."""

    def missing():
        raise OSError("no such folder")

    ours, theirs = facts(tmp_path, configs={"model": lambda: None}), facts(tmp_path, configs={"model": missing})
    assert "model: None on process 0; 'OSError: no such folder' on process 1" in told(ours, theirs)


def test_nothing_secret_is_shown(tmp_path):
    configs = {"x": {"api_key": "hf_c", "my_token": "hf_d"}}
    ours = facts(tmp_path, model_init_kwargs={"token": "hf_a"}, hub_token="hf_b", configs=configs)
    message = told(ours, {"nothing": "in common"})
    assert "hf_" not in message and "hf_" not in str(ours)


def test_a_long_list_of_differences_is_cut():
    message = told({f"a{i}": 0 for i in range(30)}, {f"a{i}": 1 for i in range(30)})
    assert "a19: 0 on process 0" in message and "a20" not in message and "and 10 more" in message


# What cannot run, before anything is loaded.


def test_fsdp_where_nothing_would_be_sharded(tmp_path, monkeypatch):
    """Accelerate shards on GPUs alone and elsewhere says nothing."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"FSDP was asked for.* \(cpu, NO\).*zero3.yaml"):
        CPOConstrainedTrainer(model="nowhere", args=CPOConstrainedConfig(**training_options(tmp_path)))


def test_a_process_of_several_that_would_train_alone(tmp_path, monkeypatch):
    args = CPOConstrainedConfig(**training_options(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one of 2 processes .*--multi_gpu --num_processes 2"):
        CPOConstrainedTrainer(model="nowhere", args=args)
    parallel.check_launch(args, DistributedType.MULTI_CPU)
    monkeypatch.setenv("WORLD_SIZE", "1")
    parallel.check_launch(args)


# Processes.


def environment(**more) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def test_two_processes_are_told_the_same_and_a_dead_one_ends_the_job(tmp_path, model_folder, tokenizer):
    other = tmp_path / "other"
    make_model(intermediate_size=32).save_pretrained(other)
    tokenizer.save_pretrained(other)
    job = {"do": "disagree", "model": model_folder, "other_model": str(other), "folder": str(tmp_path)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(SCRIPT)]
    done = subprocess.run(
        [*command, json.dumps(job)],
        capture_output=True,
        text=True,
        timeout=400,
        env=environment(HF_DATASETS_CACHE=str(tmp_path / "datasets")),
    )
    zero, one = (json.loads((tmp_path / f"told{rank}.json").read_text()) for rank in range(2))
    assert zero == one
    assert "args.gamma: 0.5 on process 0; 1.5 on process 1" in zero["gamma"]
    assert "train_dataset.8 rows" in zero["row"] and "train_dataset.rows" not in zero["row"]
    assert "train_dataset.rows: 8 on process 0; 7 on process 1" in zero["rows"]
    assert "model.intermediate_size: 48 on process 0; 32 on process 1" in zero["model"]
    assert "model: 'OSError" in zero["missing"] or "on process 1" in zero["missing"]
    assert "train_dataset.rows: 8 on process 0; 0 on process 1" in zero["empty"]
    assert zero["nothing"] is None
    # Process 1 killed itself in the middle of a training of 100 steps; the bound is the timeout above.
    assert done.returncode != 0 and "SIGKILL" in done.stderr or "-9" in done.stderr


# Two machines: two network namespaces, joined by a pair of virtual network cards.

HOSTS = ("10.193.77.1", "10.193.77.2")


def ip(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)


@pytest.fixture
def machines():
    """Names of two namespaces that reach each other, and nothing else."""
    names = [f"trlcpo{os.getpid()}{side}" for side in "ab"]
    try:
        made = ip("netns", "add", names[0])
    except FileNotFoundError:
        pytest.skip("no `ip` on this machine")
    if made.returncode:
        pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
    try:
        commands = [
            ["netns", "add", names[1]],
            # Made inside, so that nothing of the machine's own network is touched.
            ["-n", names[0], "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", names[1]],
        ]
        for name, address in zip(names, HOSTS, strict=True):
            commands += [["-n", name, "addr", "add", f"{address}/24", "dev", "veth0"]]
            commands += [["-n", name, "link", "set", device, "up"] for device in ("lo", "veth0")]
        for command in commands:
            done = ip(*command)
            if done.returncode:
                pytest.skip(f"no virtual network here: ip {' '.join(command)}: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.slow(30)
def test_two_machines_train_as_one_and_a_lost_network_ends_both(tmp_path, model_folder, machines):
    timeout = 20
    job = {"do": "train", "model": model_folder, "folder": str(tmp_path), "timeout": timeout}
    started = []
    for rank, name in enumerate(machines):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
        command += ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank), "--mixed_precision", "no"]
        command += ["--main_process_ip", HOSTS[0], "--main_process_port", "29511", "--dynamo_backend", "no"]
        with open(tmp_path / f"machine{rank}.log", "w") as log:
            started.append(
                subprocess.Popen(
                    [*command, str(SCRIPT), json.dumps(job)],
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env=environment(HF_DATASETS_CACHE=str(tmp_path / f"datasets{rank}"), GLOO_SOCKET_IFNAME="veth0"),
                )
            )
    logs = [tmp_path / f"machine{rank}.log" for rank in range(2)]

    def wait_for(what, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, "\n".join(log.read_text()[-3000:] for log in logs)
            time.sleep(0.2)

    try:
        # A first training from start to end, and the second one in its third step.
        wait_for(lambda: all((tmp_path / f"step3-{rank}").exists() for rank in range(2)), 300)
        zero, one = (json.loads((tmp_path / f"seen{rank}.json").read_text()) for rank in range(2))
        assert zero["processes"] == 2 and len(zero["loss"]) == 2
        # The losses are each process's own; the weights are one.
        assert zero["weights"] == one["weights"]
        # The cable is pulled: no connection is closed, nothing is ever answered.
        assert ip("-n", machines[0], "link", "set", "veth0", "down").returncode == 0
        pulled = time.monotonic()
        wait_for(lambda: all(process.poll() is not None for process in started), 120)
        assert all(process.returncode for process in started)
        assert time.monotonic() - pulled < timeout + 90
        assert any("Timed out" in log.read_text() or "timed out" in log.read_text() for log in logs)
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("how, ends_well", [("as-it-is", False), ("gently", True)])
def test_a_thread_of_gloo_that_is_late_does_not_kill_a_process_at_its_end(how, ends_well):
    """Without the pause PyTorch 2.13 aborts, after all was done; once it does not, trl_cpo/engine/shutdown.py can go."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    script = PROCESSES / "leave_together.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, str(script), how], capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode == 0) is ends_well, done.stderr[-3000:]
    assert ("terminate called without an active exception" in done.stderr) is not ends_well
    assert "left" in done.stdout


def test_a_trainer_ends_its_process_gently_where_there_is_gloo(monkeypatch, tmp_path, model_folder):
    registered = []
    monkeypatch.setattr(shutdown.atexit, "register", registered.append)
    backends = iter(["cpu:gloo,cuda:nccl", "cuda:nccl"])
    assert (shutdown.pause_at_exit(), registered) == (None, [])  # no process group
    with monkeypatch.context() as patched:
        patched.setattr(shutdown.dist, "is_initialized", lambda: True)
        patched.setattr(shutdown.dist, "get_backend_config", lambda: next(backends))
        shutdown.pause_at_exit()
        shutdown.pause_at_exit()
    assert registered == [shutdown._pause]

    called = []
    monkeypatch.setattr("trl_cpo.engine.dpo_trainer.pause_at_exit", lambda: called.append(True))
    CPOConstrainedTrainer(
        model=model_folder,
        args=CPOConstrainedConfig(**training_options(tmp_path)),
        processing_class=make_tokenizer(),
        train_dataset=pairs_dataset(4),
    )
    assert called
