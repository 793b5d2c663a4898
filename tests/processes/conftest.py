"""A model trained by one process, and by two."""

from pathlib import Path

import pytest

from nemojax.data.tokenizer import train_tokenizer
from tests.processes.run import RECIPE, STEPS, Run


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    train_tokenizer(["sort up 1 2 3, some text to learn bytes from " * 20], 300, folder / "tokenizer")
    for name, steps in (("short", STEPS), ("long", 400)):
        text = RECIPE.format(tokenizer=str(folder / "tokenizer"), steps=steps)
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def single(recipes, tmp_path_factory) -> Run:
    return Run("pretrain", tmp_path_factory.mktemp("one") / "run", recipes / "short.py", 1).finish()


@pytest.fixture(scope="module")
def double(recipes, tmp_path_factory) -> Run:
    return Run("pretrain", tmp_path_factory.mktemp("two") / "run", recipes / "short.py", 2).finish()
