"""Directories to import, export and damage."""

from pathlib import Path

import pytest

from nemojax.checkpoints.artifact import save_params
from tests.checkpoints.toy_models import MIXED, make_llama, random_params, write_tokenizer


@pytest.fixture
def llama_dir(tmp_path: Path) -> Path:
    """A sharded Llama directory to damage."""
    make_llama(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf", 64)
    return tmp_path / "hf"


@pytest.fixture(scope="session")
def mixed_artifact(tmp_path_factory) -> Path:
    """A DeciLM-like artifact with every kind of sub-block."""
    path = tmp_path_factory.mktemp("mixed") / "artifact"
    save_params(path, MIXED, random_params(MIXED))
    write_tokenizer(path / "tokenizer", MIXED.vocab_size)
    return path
