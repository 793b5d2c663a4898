"""Fine-tuning end to end on a tiny model: both settings of the toggle, files and problems, refusals."""

import json
from dataclasses import replace

import jax
import pytest

from nemojax import sft
from nemojax.arch import uniform
from nemojax.checkpoints.artifact import load_params, save_params
from nemojax.config import from_dict
from nemojax.data.tokenizer import load_tokenizer, train_tokenizer
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


def chats(path, count, answers=("{} is my number", "<think>{} it is</think>{}")):
    """Questions that are each answered as often as `answers` says, alternately without and with thinking."""
    rows = [
        {"input": f"say {i}", "output": answer.format(i, i), "reasoning": ("off", "on")[number % 2]}
        for i in range(count)
        for number, answer in enumerate(answers)
    ]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    return {"name": path.stem, "path": str(path)}


def test_it_trains_on_problems_and_on_files(model, tmp_path, caplog):
    few = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        {"input": "2+2", "output": "<think>two and two</think>4", "reasoning": "on"},
    ]
    path = tmp_path / "few.jsonl"
    path.write_text("\n\n".join(map(json.dumps, few)))
    many = chats(tmp_path / "many.jsonl", 100)
    sources = [{"name": "sort3", "num": 20}, {"path": str(path), "heldout_share": 0.0}, many]
    result = sft.run(config(model, sources), tmp_path / "run")
    assert "few.jsonl: skipped 1 blank line" in caplog.text
    heldout = 200 - result["conversations"]["many"]
    assert 0 < heldout < 20 and heldout % 2 == 0  # both answers to a question fall on one side
    assert result["conversations"] == {"sort3": 40, str(path): 2, "many": 200 - heldout}
    assert result["dropped"] == {"sort3": 0, str(path): 0, "many": 0}
    assert result["heldout"].keys() == {"sort3", "many", "loss"}
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[-1] < losses[0]
    (validation,) = [row for row in rows if "validation/many" in row]
    assert validation["validation/many"] == pytest.approx(result["heldout"]["many"])
    before, after = load_params(model)[1], load_params(tmp_path / "run")[1]
    assert (before["embed"]["weight"] != after["embed"]["weight"]).any()
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").is_file()
    assert sft.run(config(model, sources), tmp_path / "run") == result  # done: nothing is trained again


def test_the_held_out_conversations(model, tmp_path):
    tokenizer = load_tokenizer(model)
    source = sft.ChatSource(path=chats(tmp_path / "a.jsonl", 150)["path"])
    data = sft.ChatData(sources=(source,), length=192, heldout_num=1000)
    trained, heldout = sft._training_chats(source, data), sft._heldout_chats(source, data)
    assert len(trained) + len(heldout) == 300 and heldout
    assert not {chat.question for chat in trained} & {chat.question for chat in heldout}
    assert len(sft._heldout_chats(source, replace(data, heldout_num=3))) == 3
    assert not sft._heldout(replace(data, heldout_num=0), tokenizer)

    other = sft.ChatSource(name="other", path=chats(tmp_path / "b.jsonl", 2)["path"])
    named = replace(data, heldout=(other,))
    assert len(sft._training_chats(source, named)) == 300  # nothing is taken out
    assert sft._heldout(named, tokenizer).keys() == {"other"}
    small = sft.ChatData(sources=(other,), length=192)
    with pytest.raises(ValueError, match="source other: expected a held-out document among 4 .*data.heldout"):
        sft._heldout(small, tokenizer)
    with pytest.raises(ValueError, match="all of them held out; add more, or lower heldout_share"):
        sft._training_chats(replace(other, heldout_share=0.9999999), small)
    with pytest.raises(ValueError, match="of at most 4 tokens, got 2 longer ones; raise data.length"):
        sft._heldout(replace(named, heldout_num=2, length=4), tokenizer)


def test_a_pattern_of_files_is_an_input(model, tmp_path):
    for part in ("a", "b"):
        chats(tmp_path / f"{part}.jsonl", 60)
    cfg = config(model, [{"name": "mine", "path": str(tmp_path / "*.jsonl")}])
    result = sft.run(cfg, tmp_path / "run")
    assert result["conversations"]["mine"] > 200
    chats(tmp_path / "b.jsonl", 61)
    with pytest.raises(ValueError, match="another run, which differs in input .*b.jsonl"):
        sft.run(cfg, tmp_path / "run")


def test_what_does_not_fit_is_refused(model, tmp_path):
    problems = [{"name": "sort3", "num": 4}]
    long = chats(tmp_path / "long.jsonl", 2, ["a " * 300]) | {"heldout_share": 0.0}
    with pytest.raises(ValueError, match="at least one source"):
        sft.run(config(model, []), tmp_path / "a")
    with pytest.raises(ValueError, match="at most the context 256, got 512"):
        sft.run(config(model, problems, length=512), tmp_path / "b")
    with pytest.raises(ValueError, match=r"sort3 0: expected at most 17 tokens, got \d+"):
        sft.run(config(model, problems, length=16), tmp_path / "c")
    with pytest.raises(ValueError, match=r"long.jsonl:1: expected at most 193 tokens, got \d+"):
        sft.run(config(model, [long]), tmp_path / "d")
    with pytest.raises(ValueError, match="data.sources: expected different names, got 'sort3' twice"):
        sft.run(config(model, problems * 2), tmp_path / "e")
    with pytest.raises(ValueError, match="expected files at .*none"):
        sft.run(config(model, [{"path": str(tmp_path / "none*.jsonl")}]), tmp_path / "f")


def test_rows_that_do_not_divide_among_processes(model, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(ValueError, match="data.batch_size: expected a multiple of 3 processes, got 8"):
        sft.run(config(model, [{"name": "sort3", "num": 4}]), tmp_path / "run")
