"""Formatter, linter and the hooks of `.pre-commit-config.yaml` on the whole tree, so that CI holds what pre-commit asks for."""

import re
import subprocess
import sys
import tomllib

import pytest
import yaml

from helpers.checkout import tracked_files
from helpers.paths import ROOT

CONFIG = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
HOOKS = {hook["id"]: hook for repo in CONFIG["repos"] for hook in repo["hooks"]}


@pytest.mark.parametrize("command", [["format", "--check", "."], ["check", "."]], ids=" ".join)
def test_ruff_has_nothing_to_say(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"Run `ruff format . && ruff check --fix .`\n{done.stdout}{done.stderr}"


def test_hooks_need_no_network():
    """A hook from a repository would be cloned at the first commit."""
    assert [repo["repo"] for repo in CONFIG["repos"]] == ["local"]
    assert {hook["language"] for hook in HOOKS.values()} <= {"system", "pygrep"}
    assert {"ruff-check", "ruff-format"} <= HOOKS.keys()
    validated = subprocess.run(
        [sys.executable, "-m", "pre_commit", "validate-config", ".pre-commit-config.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert validated.returncode == 0 and not validated.stdout, validated.stdout + validated.stderr


def finds(hook: dict, content: bytes) -> bool:
    """Whether a pygrep hook refuses a file, as pre-commit decides it."""
    if "--multiline" in hook.get("args", []):
        return re.search(hook["entry"].encode(), content, re.MULTILINE | re.DOTALL) is not None
    return any(re.search(hook["entry"].encode(), line) for line in content.split(b"\n"))


@pytest.mark.parametrize("name", ["trailing-space", "end-of-file"])
def test_text_files_are_clean(name):
    kept = re.compile(CONFIG["exclude"])
    tracked = [file for file in tracked_files() if not kept.search(file)]
    texts = {file: content for file in tracked if b"\0" not in (content := (ROOT / file).read_bytes()) and content}
    assert len(texts) > 100
    assert [file for file, content in texts.items() if finds(HOOKS[name], content)] == []


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [("trailing-space", b"a \nb\n", b"a\n b\n"), ("end-of-file", b"a", b"a\n"), ("end-of-file", b"a\n\n", b"\n\na\n")],
)
def test_text_hooks_tell_clean_files_from_others(name, bad, good):
    assert finds(HOOKS[name], bad) and not finds(HOOKS[name], good)


def test_the_citation_names_this_version_and_the_paper():
    from trl_cpo import CPOConstrainedTrainer

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    (paper,) = citation["references"]
    names = " and ".join(f"{author['given-names']} {author['family-names']}" for author in paper["authors"])
    words = re.sub(r"\s+", " ", CPOConstrainedTrainer._paper["citation"])
    assert f"author = {{{names}}}" in words and f"title = {{{{{paper['title']}}}}}" in words
    assert paper["identifiers"][0]["value"] == f"arXiv:{CPOConstrainedTrainer._paper['id']}"


def test_the_changelog_knows_the_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    heads = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == "Unreleased" and heads[1] == project["version"]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_and_files_that_a_page_names_are_there(page):
    text = (ROOT / page).read_text()
    linked = [target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    named = re.findall(r"`((?:tests|trl_cpo|docs)/[\w./]+)`", text)
    assert [path for path in linked + named if not (ROOT / path).exists()] == []
