"""Fine-tuning end to end on a tiny model: both settings of the toggle, files and problems, refusals."""

import json

import jax
import pytest

from nemojax import sft
from nemojax.arch import uniform
from nemojax.checkpoints.artifact import load_params, save_params
from nemojax.config import from_dict
from nemojax.data.tokenizer import train_tokenizer
from nemojax.model import llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["sort up 1 2 3 " * 10], 300, folder / "tokenizer")
    arch = uniform(
        vocab_size=tokenizer.vocab_size,
        dim=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        ffn_width=32,
        context=256,
    )
    save_params(
        folder / "artifact", arch, llama.init_params(arch, jax.random.key(0)), 0, folder / "tokenizer"
    )
    return folder / "artifact"


def config(model, sources, **data):
    values = {
        "model": str(model),
        "data": {"sources": sources, "length": 192, "batch_size": 8, "heldout_num": 8} | data,
        "optim": {"lr": 1e-2},
        "fit": {"steps": 8, "log_every": 4},
    }
    return from_dict(sft.Config, values)


def test_it_trains_on_problems_and_on_a_file(model, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        {"input": "2+2", "output": "<think>two and two</think>4", "reasoning": "on"},
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    sources = [{"name": "sort3", "num": 20}, {"name": "chats", "path": str(path)}]
    result = sft.run(config(model, sources), tmp_path / "run")
    assert result["conversations"] == {"sort3": 40, "chats": 2}
    assert result["dropped"] == {"sort3": 0, "chats": 0}
    losses = [
        json.loads(line)["train/loss"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        if "train/loss" in line
    ]
    assert losses[-1] < losses[0]
    before, after = load_params(model)[1], load_params(tmp_path / "run")[1]
    assert (before["embed"]["weight"] != after["embed"]["weight"]).any()
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").is_file()
    assert sft.run(config(model, sources), tmp_path / "run") == result  # done: nothing is trained again


def test_what_does_not_fit_is_refused(model, tmp_path):
    problems = [{"name": "sort3", "num": 4}]
    with pytest.raises(ValueError, match="at least one source"):
        sft.run(config(model, []), tmp_path / "a")
    with pytest.raises(ValueError, match="at most the context 256, got 512"):
        sft.run(config(model, problems, length=512), tmp_path / "b")
    with pytest.raises(ValueError, match=r"sort3 0: expected at most 17 tokens, got \d+"):
        sft.run(config(model, problems, length=16), tmp_path / "c")
