"""Questions about long texts: lengths, places and grades, by models and oracles whose answers are known."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.arch import uniform
from nemojax.checkpoints.artifact import save_params
from nemojax.config import from_dict
from nemojax.data.examples import text_examples
from nemojax.data.packing import packed_batches
from nemojax.data.sources import Source, load_heldout
from nemojax.data.tokenizer import load_tokenizer, train_tokenizer
from nemojax.evaluate import run as stage
from nemojax.evaluate.haystack import NOISE, PLACED, TASKS, HaystackConfig, largest, make_pieces
from nemojax.evaluate.long_context import (
    LongContextConfig,
    ask,
    ask_all,
    ask_server,
    is_exact,
    make_samples,
    position_loss,
    prompt_ids,
    recall,
    summarise,
)
from nemojax.evaluate.perplexity import heldout_loss
from nemojax.evaluate.tasks import load_records
from nemojax.generate.local import Model
from nemojax.generate.protocol import Answer
from nemojax.generate.remote import RemoteConfig, RemoteGenerator
from nemojax.model import llama
from nemojax.sharding import MeshConfig, make_mesh, use_mesh
from tests.evaluate.copying import copying_model

ARCH = uniform(vocab_size=512, dim=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=16, context=512)
WORDS = HaystackConfig(values="words")
NOISY = HaystackConfig("noise")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [*load_heldout(Source()), NOISE]
    return train_tokenizer(texts, 512, tmp_path_factory.mktemp("tokenizer"))


def questions(tokenizer, length, tasks=TASKS, **options):
    cfg = LongContextConfig(lengths=(length,), tasks=tasks, count=2, **options)
    return make_samples(cfg, tokenizer, length)


@pytest.mark.parametrize("prompts", ["raw", "chat"])
def test_prompt_and_answer_take_the_length(tokenizer, prompts):
    found = questions(tokenizer, 2048, prompts=prompts, max_new_tokens=100)
    found += questions(tokenizer, 500, ("single", "variables"), prompts=prompts, haystack=NOISY)
    assert {(s.task, s.depth) for s in found} >= {(task, 0.25) for task in PLACED} | {("variables", None)}
    for sample in found:
        room = sample.length - (100 if sample.length == 2048 else 128)
        # what is missing is less than one more word, of needles a whole line
        assert (
            0 <= room - len(prompt_ids(tokenizer, sample.request)) <= (48 if sample.task == "needles" else 16)
        )


def test_questions_are_the_same_every_time(tokenizer):
    first = questions(tokenizer, 1500)
    assert first == questions(tokenizer, 1500)
    other = questions(tokenizer, 1500, seed=1)
    assert all(a.expected != b.expected for a, b in zip(first, other, strict=True))
    # of one index the needle and the text are the same at every depth
    by_depth = [s for s in first if s.task == "single" and s.index == 1]
    assert len({s.depth for s in by_depth}) == 5 and len({s.expected for s in by_depth}) == 1
    assert len({s.request.prompt for s in by_depth}) == 5


@pytest.mark.parametrize("haystack, off", [(HaystackConfig(), 0.08), (NOISY, 0.02)], ids=["source", "noise"])
def test_a_needle_stands_between_sentences_at_its_depth(tokenizer, haystack, off):
    for sample in questions(tokenizer, 2048, PLACED, haystack=haystack):
        assert sample.request.prompt is not None
        text = sample.request.prompt.split("\n\n", 1)[1].rpartition("\n\nWhat is")[0]
        before, after = re.split(rf"The secret number of \w+ is {sample.expected[0]}\.", text)
        assert not before.strip() or before.strip()[-1] in ".!?" or not after.strip() or "\n\n" in after[:9]
        counts = [len(tokenizer.encode(part)) for part in (before, after)]
        # sentences of the reference are long: half of one is how far off it may be
        assert counts[0] / sum(counts) == pytest.approx(sample.depth, abs=off)


def test_texts_are_repeated_and_turned(tokenizer):
    pieces = make_pieces(["One, two. Three", "four!"], tokenizer, 8)
    assert "".join(pieces.words) == "\n\nOne, two. Three\n\nfour!\n\nOne"
    assert [pieces.words[i].strip() for i in pieces.stops_S] == ["One", "Three", "four", "One"]
    assert pieces.known == {"one", ",", "two", ".", "three", "four", "!"}
    assert pieces.ends_P[-1] == sum(len(tokenizer.encode(word)) for word in pieces.words)
    turned = {"".join(pieces.turned(np.random.default_rng(seed)).words).strip() for seed in range(20)}
    assert turned == {
        "One, two. Three\n\nfour!\n\nOne",
        "Three\n\nfour!\n\nOne\n\nOne, two.",
        "four!\n\nOne\n\nOne, two. Three",
        "One\n\nOne, two. Three\n\nfour!",
    }
    assert (
        pieces.hide(8, ["A.", "B.", "C."], [0.0, 0.6, 1.0]) == "A.\n\nOne, two. Three B.\n\nfour!\n\nOne C."
    )


def test_the_largest_is_found_in_few_calls():
    rng = np.random.default_rng(0)
    for _ in range(50):
        costs = np.cumsum(rng.integers(1, 9, size=1000))
        budget, calls = int(rng.integers(costs[3], costs[-1])), []

        def cost(n, costs=costs, calls=calls):
            calls.append(n)
            return int(costs[n])

        n = largest(cost, budget, 3, 999)
        assert n is not None and costs[n] <= budget and (n == 999 or costs[n + 1] > budget)
        assert len(calls) < 14
    assert largest(lambda n: n, 5, 6, 9) is None and largest(lambda n: n, 50, 6, 9) == 9


def test_grades():
    assert recall(("1234567",), "It is 1234567.") == 1.0
    assert recall(("1234567",), "It is 91234567.") == recall(("1234567",), "") == 0.0
    assert recall(("lomira", "bekato", "tupiga"), "LOMIRA, and tupigas; bekato") == pytest.approx(2 / 3)
    assert is_exact("1234567", " 1234567. The river") and is_exact("lomira", "**Lomira**")
    assert not is_exact("1234567", "7654321, or 1234567") and not is_exact("1234567", " ")


class Oracle:
    """Answers by searching the prompt."""

    def __init__(self, tokenizer, right=True):
        self.tokenizer, self.right = tokenizer, right

    def answer(self, requests):
        return [[self._answer(request)] for request in requests]

    def stream(self, requests):
        yield from enumerate(self.answer(requests))

    def _answer(self, request):
        prompt = request.prompt if request.prompt is not None else request.messages[-1]["content"]
        _, rest = prompt.split("\n\n", 1)
        text, _, question = rest.rpartition("\n\nW")
        found = self.find(text, question)
        said = "It is " + " and ".join(found if self.right else [word[::-1] for word in found])
        return Answer(said, None, said, "stop", 5, len(prompt_ids(self.tokenizer, request)))

    def find(self, text, question):
        if "variables" in question:
            [number] = set(re.findall(r"\d{5}", question))
            given = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text))
            return [name for name in given if self._value(given, name) == number]
        if "commonest" in question:
            return [word for word, _ in Counter(re.findall(r"[a-z]+", text)).most_common(10)]
        if "frequent" in question:
            return [word for word, _ in Counter(re.findall(r"[a-z]+", text)).most_common(3)]
        [asked] = re.findall(r" of ([^?]+)\?", question)
        keys = asked.replace(" and ", ", ").split(", ")
        held = re.findall(r"The secret (?:number|word) of (\w+) is (\w+)\.", text)
        return [value for key, value in held if key in keys]

    def _value(self, given, name):
        while name in given:
            name = given[name]
        return name


@pytest.mark.parametrize("options", [{}, {"prompts": "chat", "haystack": WORDS}, {"haystack": NOISY}])
def test_an_oracle_answers_everything_and_a_liar_nothing(tokenizer, options):
    cfg = LongContextConfig(lengths=(1500, 2500), tasks=TASKS, depths=(0.0, 1.0), count=1, **options)
    records = ask_server(Oracle(tokenizer), tokenizer, cfg)
    cells = summarise(records)
    assert list(cells) == [*TASKS, "all"] and all(list(c) == ["1500", "2500"] for c in cells.values())
    assert all(cell["recall"] == 1.0 for lengths in cells.values() for cell in lengths.values())
    assert cells["single"]["1500"]["depths"] == {"0": 1.0, "1": 1.0}
    assert cells["all"]["2500"]["samples"] == 3 * 2 + 5
    assert "depths" not in cells["variables"]["1500"] and "exact" not in cells["variables"]["1500"]
    num = {r["task"]: len(r["expected"]) for r in records}
    assert list(num.values()) == [1, 1, 1, 4, 4, 5, 10, 3]
    lies = summarise(ask_server(Oracle(tokenizer, right=False), tokenizer, cfg))
    assert all(cell["recall"] == 0.0 for lengths in lies.values() for cell in lengths.values())


# Models


@pytest.fixture(scope="module")
def copying(tokenizer) -> Model:
    arch, params = copying_model(tokenizer.vocab_size, context=1024)
    return Model(arch, tokenizer, params)


CFG = LongContextConfig(
    lengths=(384,),
    tasks=("single", "multikey"),
    depths=(0.0, 0.5, 1.0),
    count=2,
    max_new_tokens=12,
    measures=("generate", "forced"),
    cache_tokens=1024,
)


@pytest.fixture(scope="module")
def copied(copying):
    return ask_all(copying, CFG)


def test_a_model_that_copies_finds_every_needle(tokenizer, copied):
    assert [(r["length"], r["task"], r["depth"], r["index"]) for r in copied] == [
        (384, task, d, i) for task in CFG.tasks for d in CFG.depths for i in range(2)
    ]
    for record in copied:
        assert record["recall"] == record["exact"] == record["forced"] == 1.0
        assert -0.1 < record["logprob"] <= 0
        assert record["tokens"] == 12 and not record["finished"]
        assert record["length"] - 12 - 16 <= record["prompt_tokens"] <= record["length"] - 12


def test_one_that_looks_back_a_little_finds_what_is_near(tokenizer):
    arch, params = copying_model(tokenizer.vocab_size, 1024, window=200)
    cfg = dataclasses.replace(CFG, lengths=(512,), tasks=("single",), measures=("generate",))
    cell = summarise(ask_all(Model(arch, tokenizer, params), cfg))["single"]["512"]
    assert cell["depths"] == {"0": 0.0, "0.5": 0.0, "1": 1.0}
    assert cell["recall"] == pytest.approx(1 / 3)


def test_forced_reading_is_the_probability_of_the_answer(tokenizer):
    """A model that is wrong, against logits that are written out."""
    model = Model(ARCH, tokenizer, llama.init_params(ARCH, jax.random.key(0)))
    cfg = dataclasses.replace(CFG, tasks=("multivalue",), max_new_tokens=60, count=3)
    cfg = dataclasses.replace(cfg, measures=("forced",))
    records, samples = ask_all(model, cfg), make_samples(cfg, tokenizer, 384)
    apply = jax.jit(lambda tokens: llama.apply(model.params, ARCH, {"tokens": tokens})[0])
    for record, sample in zip(records, samples, strict=True):
        prompt = prompt_ids(tokenizer, sample.request)
        ids = [*prompt, *tokenizer.encode(" " + ", ".join(sample.expected))]
        tokens = jnp.zeros((1, 384), jnp.int32).at[0, : len(ids)].set(jnp.array(ids))
        logps = np.asarray(jax.nn.log_softmax(apply(tokens)[0]))[np.arange(len(ids) - 1), ids[1:]]
        assert record["logprob"] == pytest.approx(logps[len(prompt) - 1 :].sum(), rel=1e-5)
        assert record["forced"] == 0.0 and "recall" not in record and len(sample.expected) == 4
    assert summarise(records)["multivalue"]["384"]["samples"] == 3


def rows_of(tokenizer, length, batch_size):
    examples = text_examples(load_heldout(Source()), tokenizer)
    return {"pydoc": packed_batches(examples, batch_size, length, tokenizer.pad_id, max_batches=1)}


def test_loss_by_position(tokenizer):
    batches = rows_of(tokenizer, 256, 8)
    params = llama.init_params(ARCH, jax.random.key(0))
    found = position_loss(params, ARCH, batches)["pydoc"]
    [batch] = batches["pydoc"]
    logits, _ = jax.jit(lambda rows: llama.apply(params, ARCH, rows))(dict(batch))
    logps = np.asarray(jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1))[
        ..., 0
    ]
    for row in found:
        here = (batch["positions"] + 1 >= row["from"]) & (batch["positions"] < row["to"])
        here &= batch["weights"] > 0
        assert row["tokens"] == here.sum() > 0
        assert row["loss"] == pytest.approx(-logps[here].mean(), rel=1e-5)
    assert [row["from"] for row in found] == [1, 2, 3, 5, 9, 17, 33, 65, 129] and found[-1]["to"] == 256
    total = sum(row["loss"] * row["tokens"] for row in found) / sum(row["tokens"] for row in found)
    assert total == pytest.approx(heldout_loss(params, ARCH, batches)["loss"], rel=1e-5)

    mesh = make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))
    with use_mesh(mesh):
        split = jax.device_put(params, llama.param_shardings(ARCH, mesh))
    for one, other in zip(found, position_loss(split, ARCH, batches, mesh=mesh)["pydoc"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_forced_reading_on_a_mesh(copying, copied):
    """Two rows at a time for twelve questions, over devices that share rows, positions and heads."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, context=2, tensor=2))
    with use_mesh(mesh):
        params = jax.device_put(copying.params, llama.param_shardings(copying.arch, mesh))
    cfg = dataclasses.replace(CFG, measures=("forced",), cache_tokens=2 * 384)
    records = ask_all(dataclasses.replace(copying, params=params, mesh=mesh), cfg)
    for one, other in zip(records, copied, strict=True):
        assert one["question"] == other["question"] and one["forced"] == other["forced"] == 1.0
        assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)


# The stage


@pytest.fixture(scope="module")
def artifact(copying, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("copying") / "model"
    return str(save_params(path, copying.arch, copying.params, tokenizer_dir=tokenizer.path))


def settings(models, **options):
    values = {
        "models": models,
        "data": {"length": 256, "batch_size": 8, "heldout_batches": 1},
        "tasks": {"problems": {"families": ["sum2x1"], "count": 2}, "max_new_tokens": 4, "thinking": "off"},
        "latency": {"batch": 0},
        "long_context": {
            "lengths": [384],
            "depths": [0, 1],
            "count": 2,
            "max_new_tokens": 12,
            "cache_tokens": 1024,
        },
    }
    return from_dict(stage.Config, values | options)


def test_the_stage_measures_and_draws(copying, artifact, tmp_path):
    cfg = settings({"copying": artifact})
    result = stage.run(cfg, tmp_path / "out")
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    row = result["models"]["copying"]
    cell = {"recall": 1.0, "exact": 1.0, "samples": 4, "depths": {"0": 1.0, "1": 1.0}}
    assert row["long_context"] == {"single": {"384": cell}}
    assert load_records(tmp_path / "out" / "long_context_copying.jsonl") == ask_all(copying, cfg.long_context)
    picture = (tmp_path / "out" / "long_context_copying_single.svg").read_text()
    assert picture.startswith("<svg xmlns=") and picture.count(">100</text>") == 2
    assert stage.table(result).splitlines()[1:] == ["model    task       384", "copying  single  100.0%"]
    [source] = row["by_position"]
    assert source == "pydoc" and row["by_position"][source][-1]["to"] == 512


@pytest.mark.slow
def test_a_server_is_asked_the_same(artifact, tmp_path):
    """The same model in process and served: the same answers, and of the server nothing but them."""
    from tests.serve.live import serving

    with serving(Path(artifact), tmp_path / "cache", "--config.engine.slots=2") as live:
        cfg = settings({"here": artifact, "there": f"{live.url}/v1"}, remote={"timeout": 120.0})
        result = stage.run(cfg, tmp_path / "out")
        chat = dataclasses.replace(cfg.long_context, prompts="chat", lengths=(512,), count=1)
        with RemoteGenerator(RemoteConfig(f"{live.url}/v1", timeout=120.0)) as remote:
            answered = ask(remote, make_samples(chat, load_tokenizer(artifact), 512))
    here, there = result["models"]["here"], result["models"]["there"]
    assert there.keys() == {"artifact", "tasks", "long_context"} and "by_position" in here
    assert there["long_context"] == here["long_context"]
    records = [load_records(tmp_path / "out" / f"long_context_{name}.jsonl") for name in ("here", "there")]
    assert records[0] == records[1] and all(512 - 12 - 16 <= r["prompt_tokens"] <= 500 for r in answered)


def test_without_lengths_nothing_is_measured():
    assert stage.Config().long_context.lengths == ()
    assert stage.table({"models": {"a": {"heldout": {}}, "b": {"artifact": "http://b"}}}) == ""


@pytest.mark.parametrize(
    "change, message",
    [
        ({"count": 0}, "count: expected 1 or more, got 0"),
        ({"cache_tokens": -1}, "cache_tokens: expected 1 or more, got -1"),
        ({"tasks": ()}, "tasks: expected at least one, got none"),
        ({"lengths": (512, 512)}, r"lengths: expected each once, got \[512, 512\]"),
        ({"lengths": (128,)}, "lengths: expected more than the 128 tokens of max_new_tokens, got 128"),
        ({"depths": (0.5, 50.0)}, "depths: expected numbers from 0 to 1, got 50.0"),
    ],
)
def test_settings_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        LongContextConfig(**change)


def test_an_unknown_task_names_the_known_ones():
    with pytest.raises(ValueError, match="tasks.0: expected one of 'single', .* got 'double'"):
        from_dict(LongContextConfig, {"tasks": ["double"]})


def test_lengths_that_do_not_fit(tokenizer, copying, artifact, tmp_path):
    with pytest.raises(
        ValueError, match=r"expected at least \d+ tokens for single, 128 of them for the answer"
    ):
        questions(tokenizer, 150, ("single",))
    with pytest.raises(ValueError, match=r"expected at least \d+ tokens for common_words, .* got 512"):
        questions(tokenizer, 512, ("common_words",))
    with pytest.raises(
        ValueError, match=r"max_new_tokens: expected at least \d+, which the answer to multiv"
    ):
        questions(tokenizer, 512, ("multivalue",), max_new_tokens=8)
    with pytest.raises(ValueError, match="expected at most 1024 tokens, the context of .*, got 4096"):
        ask_all(copying, LongContextConfig(lengths=(512, 4096)))
    cfg = settings({"mine": artifact}, long_context={"lengths": [4096]})
    with pytest.raises(ValueError, match="expected at most 1024 tokens, the context of mine, got 4096"):
        stage.run(cfg, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_a_server_needs_a_tokenizer(tmp_path):
    cfg = settings({"there": "http://127.0.0.1:9/v1"})
    with pytest.raises(ValueError, match="long_context.tokenizer: expected a directory"):
        stage.run(cfg, tmp_path / "out")
    cfg = settings({"there": "http://127.0.0.1:9/v1"}, long_context={"lengths": [512], "tokenizer": "/none"})
    with pytest.raises(ValueError, match="/none: expected an artifact, a directory or a file"):
        stage.run(cfg, tmp_path / "other")
