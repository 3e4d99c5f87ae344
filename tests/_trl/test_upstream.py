"""Upstream's insides are guarded: each name that we rest on is renamed in turn, and a trainer is refused."""

import ast
import sys
from importlib import import_module
from pathlib import Path
from types import CodeType

import pytest
import transformers
import trl

import trl_cpo
from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo._trl import upstream

from helpers.tiny import training_options

PACKAGE = Path(trl_cpo.__file__).parent
READ = [(owner, name) for owner, names in upstream.READ.items() for name in names]


def renamed(code: CodeType, name: str) -> CodeType:
    """The code as it would be, had upstream called an attribute otherwise."""
    constants = tuple(renamed(c, name) if isinstance(c, CodeType) else c for c in code.co_consts)
    names = tuple(f"{each}_renamed" if each == name else each for each in code.co_names)
    return code.replace(co_consts=constants, co_names=names)


def rename(monkeypatch, owner: str, name: str) -> None:
    module, _, cls = owner.partition(":")
    place = getattr(import_module(module), cls) if cls else import_module(module)
    if not isinstance(place, type):
        monkeypatch.delattr(place, name)
        return
    for base in place.__mro__[:-1]:
        if name in vars(base):
            monkeypatch.delattr(base, name)
        for member in list(vars(base).values()):
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            function = getattr(function, "__wrapped__", function)
            if hasattr(function, "__code__"):
                monkeypatch.setattr(function, "__code__", renamed(function.__code__, name))


def test_all_is_there():
    assert upstream.missing_upstream() == []
    upstream.check_upstream()


@pytest.mark.parametrize("name", upstream.OVERRIDDEN)
def test_an_overridden_method_that_is_renamed_is_refused(monkeypatch, name):
    rename(monkeypatch, "trl:DPOTrainer", name)
    with pytest.raises(ImportError) as error:
        upstream.check_upstream()
    assert f"DPOTrainer.{name}" in str(error.value)


@pytest.mark.parametrize(("owner", "name"), READ, ids=str)
def test_a_private_name_that_is_renamed_is_refused(monkeypatch, owner, name):
    rename(monkeypatch, owner, name)
    with pytest.raises(ImportError) as error:
        upstream.check_upstream()
    said = str(error.value)
    assert f"{owner}.{name}" in said
    assert f"trl {trl.__version__}" in said and f"transformers {transformers.__version__}" in said


def test_a_method_that_upstream_no_longer_calls_is_refused(monkeypatch):
    """It is still there, and nobody runs ours."""
    for base in trl.DPOTrainer.__mro__[:-1]:
        for member in list(vars(base).values()):
            if hasattr(member, "__code__"):
                monkeypatch.setattr(member, "__code__", renamed(member.__code__, "_finalize_training"))
    assert hasattr(trl.DPOTrainer, "_finalize_training")
    assert upstream.missing_upstream() == ["trl:DPOTrainer._finalize_training"]


def test_the_trainer_is_stopped_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.delattr(transformers.Trainer, "_run_epoch")
    with pytest.raises(ImportError, match="_run_epoch"):
        CPOConstrainedTrainer(model="nowhere", args=CPOConstrainedConfig(**training_options(tmp_path)))


def test_every_overridden_method_is_listed():
    ours = [cls for cls in CPOConstrainedTrainer.__mro__ if cls.__module__.startswith("trl_cpo")]
    assert len(ours) == 3
    upstreams = {name for cls in trl.DPOTrainer.__mro__[:-1] for name, value in vars(cls).items() if callable(value)}
    overridden = {name for cls in ours for name in vars(cls)} & upstreams
    assert overridden - {"__init__"} == set(upstream.OVERRIDDEN)


def private_reads(tree: ast.AST) -> set[str]:
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
    }


def own_names(tree: ast.AST) -> set[str]:
    """Private names that a file of ours defines itself: methods, functions, classes, and what it sets on self."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


#: Private names of other libraries, which are no part of TRL's or transformers' insides: torch's modules keep their parts
#: there, and checkpointing, DDP and argparse are told things there.
ELSEWHERE = {
    "_buffers",
    "_modules",
    "_parameters",
    "_non_persistent_buffers_set",
    "_save_to_state_dict",
    "_ddp_params_and_buffers_to_ignore",
    "_actions",
    "_SubParsersAction",
    "_cdata",
}


def test_every_private_name_of_upstream_that_is_read_is_listed():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    ours = set().union(*map(own_names, trees)) - {name for _, name in READ}
    read = set().union(*map(private_reads, trees)) - ours - ELSEWHERE
    listed = {name for _, name in READ} | set(upstream.OVERRIDDEN)
    assert read <= listed, f"read and not in READ: {sorted(read - listed)}"


def test_unsupported_trl_is_named():
    upstream.check_upstream(trl.__version__)
    upstream.check_upstream("1.15.0")
    upstream.check_upstream("1.16.3")
    for version in ("1.14.2", "1.17.0", "0.9.6", "2.0.0"):
        with pytest.raises(ImportError) as error:
            upstream.check_upstream(version)
        assert version in str(error.value) and str(upstream.SUPPORTED_TRL) in str(error.value)


def test_trl_without_a_head_for_cpus_is_refused_there(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ImportError, match=r"TRL 1\.15\.0 computes .* on a GPU alone.*pip install 'trl>=1\.16"):
        upstream.check_kernels("cpu", "1.15.0")
    upstream.check_kernels("cpu", "1.16.0")
    upstream.check_kernels("cuda", "1.15.0")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    upstream.check_kernels("cpu", "1.15.0")


def test_trainer_and_scoring_ask_whether_the_head_runs(monkeypatch, tmp_path, small_model):
    from transformers import AutoModelForCausalLM

    from trl_cpo._trl.reference import fused_head

    def asked(device):
        raise ImportError(f"asked for {device}")

    monkeypatch.setattr("trl_cpo.engine.dpo_trainer.check_kernels", asked)
    monkeypatch.setattr("trl_cpo._trl.reference.check_kernels", asked)
    args, model = CPOConstrainedConfig(**training_options(tmp_path)), AutoModelForCausalLM.from_pretrained(small_model)
    with pytest.raises(ImportError, match="asked for cpu"):
        CPOConstrainedTrainer(model="nowhere", args=args)
    with pytest.raises(ImportError, match="asked for cpu"):
        fused_head(model).__enter__()


def test_only_the_seam_and_the_overrides_know_the_inside_of_trl():
    """Private names of DPOTrainer appear in `_trl` alone, and where subclasses override them."""
    private = {name for name in vars(trl.DPOTrainer) if name.startswith("_") and not name.startswith("__")}
    private |= {"_metrics", "precompute_ref_logps"}
    allowed = set(upstream.OVERRIDDEN) | {"_tag_names", "_name", "_paper"}
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "_trl":
            names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
            assert not (names & private) - allowed, path.relative_to(PACKAGE)


def test_looking_costs_milliseconds():
    import time

    started = time.perf_counter()
    upstream.missing_upstream()
    assert time.perf_counter() - started < 1.0 and "trl" in sys.modules
