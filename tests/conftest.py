"""Shared models, and shape checking of every annotated function while tests run."""

import os

# Before torch reads it: processes side by side share the cores, and so do what they start.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import torch
from jaxtyping import install_import_hook

# Before the libraries that read it are imported: the tests never ask a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

# Before anything imports triton, if it is there: without a GPU its kernels run interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Before the first import of eyechart.
install_import_hook("eyechart", "typechecking.checked")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from handmade import write_handmade

import eyechart
from eyechart.models import CATALOGUE, DEFAULT_MODEL

pytest_plugins = ("browsing",)

TINY = sorted(name for name in CATALOGUE if name.startswith("tiny-random-"))


@pytest.fixture(scope="session")
def default_model() -> Any:
    """The real model every claim is checked on."""
    return eyechart.load(DEFAULT_MODEL, device="cpu")


@pytest.fixture(scope="session")
def llama() -> Any:
    """A tiny random model with grouped queries and rotary positions."""
    return eyechart.load("tiny-random-llama", device="cpu")


@pytest.fixture(scope="session")
def gpt2() -> Any:
    """A tiny random model with learned positions and a joint projection."""
    return eyechart.load("tiny-random-gpt2", device="cpu")


@pytest.fixture(scope="session")
def handmade(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The model whose four heads are known by construction."""
    folder = tmp_path_factory.mktemp("handmade")
    write_handmade(folder)
    return eyechart.load(str(folder), device="cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder of its own."""
    monkeypatch.setenv("EYECHART_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"


@pytest.fixture(autouse=True)
def deterministic() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
