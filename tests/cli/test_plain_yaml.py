"""A recipe that another wrote ends in values or in a sentence, soon."""

import os
import time

import pytest

from trl_cpo.cli import main
from trl_cpo.cli.errors import UserError
from trl_cpo.cli.options import parse_run, read_config
from trl_cpo.cli.plain_yaml import DEEPEST, MOST_VALUES, YamlError, read_yaml


def bomb(levels=9, each=9):
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * each)}]" for n in range(1, levels))]
    return "\n".join(lines)


ATTACKS = {
    "alias bomb": (bomb(), "values, with each alias"),
    "alias bomb in an option": (bomb() + "\nreport_to: *a8", "values, with each alias"),
    "merge bomb": (
        "\n".join(["a0: &a0 {k0: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 9))]),
        "values, with each alias",
    ),
    "nested lists": ("report_to: " + "[" * 3000 + "]" * 3000, f"more than {DEEPEST} deep"),
    "nested mappings": ("x: " + "{a: " * 3000 + "1" + "}" * 3000, f"more than {DEEPEST} deep"),
    "nested blocks": ("\n".join(" " * n + "a:" for n in range(300)), f"more than {DEEPEST} deep"),
    "nested and unclosed": ("report_to: " + "[" * 3000, "deep"),
    "itself": ("report_to: &a [*a]", "alias of what it stands in"),
    "large": ("gamma: 1 " + "#" * 2**17, "more than 65,536 bytes"),
    "no date": ("run_name: 2024-99-99", "'2024-99-99' is no timestamp (line 1)"),
    "no integer": ("gamma: 1\nseed: !!int abc", "'abc' is no int (line 2)"),
    "no truth": ("gamma: !!bool maybe", "'maybe' is no bool"),
    "no time": ("run_name: !!timestamp soon", "is no timestamp"),
    "5,000 digits": ("seed: " + "1" * 5000, "is no int"),
    "4,000 digits": ("seed: " + "1" * 4000, "seed: is too large"),
    "4,000 digits for a number": ("gamma: " + "1" * 4000, "gamma: is too large"),
    "a key is a list": ("[1, 2]: 3", "unhashable key"),
    "env": ('env: {"A=B": 1}', "env names are letters, digits and _; got 'A=B'"),
    "env without a name": ('env: {"": 1}', "env names are"),
    "env with NUL": ('env: {"A": "x\\0y"}', "env value of A must be"),
    "env of lists": ("env: {A: [1]}", "env value of A must be a text or a number; got a list"),
    "env is a list": ("env: [SECRET]", "env must map"),
    "NUL": ('output_dir: "a\\0b"', "output_dir: holds the character NUL"),
    "not UTF-8": (b"gamma: \xff", "is not YAML"),
    "python": ("gamma: !!python/object/apply:os.getcwd []", "is not YAML"),
    "several": ("a: 1\n---\nb: 2", "is not YAML"),
    "merge of a number": ("model_init_kwargs: {<<: 1}", "is not YAML"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_ends_in_a_sentence(tmp_path, capsys, name):
    text, message = ATTACKS[name]
    file = tmp_path / "r.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    start = time.process_time()
    before = dict(os.environ)
    assert main(["train", "--config", str(file), "--output_dir", str(tmp_path / "out"), "--use_cpu"]) == 2
    assert time.process_time() - start < 20
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and len(said) < 1000
    assert dict(os.environ) == before and not (tmp_path / "out").exists()


def read(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    return read_yaml(tmp_path / "r.yaml")


def test_merge_keys_work(tmp_path):
    text = "x: &x {a: 1, b: 2}\ny: &y {<<: *x, b: 3}\nz: {<<: [*y, {c: 4}], a: 5}\nw: {<<: *y}\n"
    made = read(tmp_path, text)
    assert made["y"] == {"a": 1, "b": 3} and made["z"] == {"a": 5, "b": 3, "c": 4} and made["w"] == made["y"]
    with pytest.raises(YamlError, match=r"the key 'a' is given twice \(line 1\)"):
        read(tmp_path, "z: {<<: {a: 0}, a: 1, a: 2}")


def test_the_bounds_leave_room(tmp_path):
    assert len(read(tmp_path, f"a: [{'1, ' * (MOST_VALUES - 10)}1]")["a"]) == MOST_VALUES - 9
    deep = read(tmp_path, "[" * DEEPEST + "]" * DEEPEST)
    for _ in range(DEEPEST - 1):
        (deep,) = deep
    assert deep == []
    assert read(tmp_path, "a: &a [1]\nb: [*a, *a]") == {"a": [1], "b": [[1], [1]]}
    assert read(tmp_path, "") is None


def test_env_is_set_once_all_is_well(tmp_path, monkeypatch):
    monkeypatch.delenv("A_B", raising=False)
    (tmp_path / "r.yaml").write_text("gamma: 0.5\nuse_cpu: true\nbf16: false\nenv: {A_B: 1}\n")
    _, args, _ = parse_run([], str(tmp_path / "r.yaml"))
    assert args.gamma == 0.5 and os.environ.pop("A_B") == "1"


def test_a_recipe_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        read_config(str(tmp_path))
