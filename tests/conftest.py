"""Fixtures that all tests share. Nothing is downloaded."""

import gc
import os
import shutil

import pytest

from helpers import imported  # noqa: F401
from helpers.tiny import make_model, make_tokenizer, pairs_dataset


@pytest.fixture(scope="session", autouse=True)
def cache_of_this_run(tmp_path_factory):
    """Keeps what tests store, such as tables of log-probabilities, out of the user's cache."""
    before = os.environ.get("TRL_CPO_CACHE")
    os.environ["TRL_CPO_CACHE"] = str(tmp_path_factory.mktemp("trl_cpo_cache"))
    yield
    if before is None:
        del os.environ["TRL_CPO_CACHE"]
    else:
        os.environ["TRL_CPO_CACHE"] = before


@pytest.fixture(scope="session")
def tokenizer_session():
    return make_tokenizer()


@pytest.fixture
def tokenizer(tokenizer_session):
    import copy

    return copy.deepcopy(tokenizer_session)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer_session) -> str:
    """An ordinary model folder: tiny Llama and tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    tokenizer_session.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def ref_model_folder(tmp_path_factory, tokenizer_session) -> str:
    """Another tiny model of the same vocabulary, so that policy and reference differ from the first step."""
    folder = tmp_path_factory.mktemp("ref_model")
    make_model(seed=7).save_pretrained(folder)
    tokenizer_session.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory, tokenizer_session) -> str:
    """The same with one layer, for tests that train and save often."""
    folder = tmp_path_factory.mktemp("small")
    make_model(num_hidden_layers=1).save_pretrained(folder)
    tokenizer_session.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def plain(model_folder, tokenizer):
    """Full fine-tuning from a folder; the reference is TRL's own."""

    def build(**extra):
        return dict(
            model=model_folder,
            processing_class=tokenizer,
            train_dataset=pairs_dataset(),
            eval_dataset=pairs_dataset(6, seed=5),
            **extra,
        )

    return build


def demo_cache_of(basetemp, is_worker: bool):
    # A worker's own folder lies inside the one that all workers of the run share.
    return (basetemp.parent if is_worker else basetemp) / "trl_cpo_cache"


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory) -> str:
    """A cache folder shared by all test processes, so that the embedded model is converted once in a test run."""
    return str(demo_cache_of(tmp_path_factory.getbasetemp(), "PYTEST_XDIST_WORKER" in os.environ))


def pytest_collection_modifyitems(items):
    """Slow tests whose marks tell seconds come first, the longest before the others: the processes then end together."""
    items.sort(key=lambda item: -max((mark.args[0] for mark in item.iter_markers("slow") if mark.args), default=0))


def pytest_collection_finish():
    """Leaves what the libraries made when they were imported out of garbage collections.

    Accelerate collects at the start of every training, and went through millions of such objects: half of a tiny training.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session):
    """Removes the converted model, half a gigabyte, which pytest would keep."""
    factory = getattr(session.config, "_tmp_path_factory", None)
    if factory is not None and "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(demo_cache_of(factory.getbasetemp(), is_worker=False), ignore_errors=True)
