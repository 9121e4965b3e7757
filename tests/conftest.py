"""Fixtures shared by all tests: the default model's file and the material of ../shared where it is
there.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
from pathlib import Path

import pytest

# Two OpenMP threads on two busy cores spin for each other: one is slower on a quiet machine and
# steady on a noisy one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Started behind a shell's `&`, Python ignores Ctrl-C, and so would every process of the tests that
# are about it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent

LONGEST = (
    "test_equivalence", "test_compile_sm90", "test_differential", "test_sample", "test_decode_attention", "test_light",
    "test_memory", "test_quantised", "test_gate", "test_evaluate", "test_bad_input", "test_draft_model",
)  # fmt: skip
"""Beginnings of the names of the files that take longest. They go first, so that all workers of a
run end together.
"""


@pytest.fixture(autouse=True)
def log_level_of_nobody() -> None:
    """A command sets the level of our logger for its process, which other tests share."""
    logging.getLogger("octavo").setLevel(logging.NOTSET)


@pytest.fixture(scope="module", autouse=True)
def what_is_loaded_is_kept() -> None:
    """The millions of objects of torch and transformers are no garbage, and an engine that closes
    collects it: looking at them takes a third of a second each time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model's GGUF file, fetched into the user's cache if it is not there."""
    from octavo.weights.default_model import default_model_path

    return default_model_path()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of test texts and templates; tests that need it skip where it is absent."""
    return find_shared() / "data"


def find_shared() -> Path:
    """The folder of test material. Where it is absent the test skips, but fails in CI, which must
    not be green so.
    """
    folder = Path(os.environ.get("OCTAVO_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir():
        message = f"no test data at {folder / 'data'}: set OCTAVO_SHARED"
        if os.environ.get("CI", "").lower() in ("true", "1"):
            pytest.fail(message)
        pytest.skip(message)
    return folder


def pytest_sessionfinish() -> None:
    """What was frozen ends as it would have: the interpreter's end names it leaked otherwise."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; tests marked `gpu` skip where there is no CUDA device."""
    import torch

    def rank(item: pytest.Item) -> int:
        return next((rank for rank, name in enumerate(LONGEST) if item.path.stem.startswith(name)), len(LONGEST))

    items.sort(key=rank)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
