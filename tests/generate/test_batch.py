"""Files of prompts: what is asked, what is written, and that an interruption does not show."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from nemojax import hosts
from nemojax.arch import uniform
from nemojax.checkpoints.artifact import load_model, save_params
from nemojax.data.tokenizer import load_tokenizer, train_tokenizer
from nemojax.generate import batch
from nemojax.generate.batch import AnswerConfig, GenerateConfig, row_seed
from nemojax.generate.completions import complete
from nemojax.generate.engine import Engine
from nemojax.generate.jobs import Job, job_key
from nemojax.generate.local import Model, Reader, batch_config, encode_request
from nemojax.generate.output import opened, sidecar
from nemojax.generate.protocol import Answer, Request
from nemojax.generate.sampling import SamplingConfig
from nemojax.model.llama import init_params
from nemojax.sharding import make_mesh
from tests.generate.asking import command, read, write

CONTEXT = 128
CONFIG = GenerateConfig(SamplingConfig(max_new_tokens=8), n=2, seed=3, logprobs=True, chunk=3, max_batch=8)
CHAT = [{"role": "user", "content": "two and two"}]
ROWS = [
    {"prompt": "one and"},
    {"id": "second", "messages": CHAT},
    {"messages": CHAT, "thinking": True},
    {"prompt": "to", "temperature": 0, "max_new_tokens": 5},
    {"messages": [{"role": "system", "content": "Be short."}, *CHAT], "thinking": False},
    {"id": 70, "prompt": "", "top_k": 4, "repetition_penalty": 1.2},
    {"messages": CHAT},
]
FLAGS = ["--n=2", "--seed=3", "--max_new_tokens=8", "--logprobs", "--config.chunk=3", "--config.max_batch=8"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    tokenizer = train_tokenizer(["one and two make three " * 20], 280, folder / "tokenizer")
    arch = uniform(
        vocab_size=tokenizer.vocab_size,
        dim=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        ffn_width=64,
        context=CONTEXT,
    )
    params = jax.tree.map(lambda w: w * 1.5, init_params(arch, jax.random.key(0)))
    return save_params(folder / "model", arch, params, tokenizer_dir=folder / "tokenizer")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", ROWS)


@pytest.fixture(scope="module")
def whole(artifact, prompts) -> Path:
    """The output of an uninterrupted run."""
    out = prompts.parent / "whole.jsonl"
    counts = batch.run(artifact, prompts, out, CONFIG, quiet=True)
    tokens = sum(row["num_tokens"] for row in read(out))
    assert counts == {"prompts": 7, "rows": 14, "rows_before": 0, "tokens": tokens}
    return out


def requests(rows, cfg=CONFIG) -> list[Request]:
    return [batch.make_request(row, i, i + 1, f"row {i + 1}", cfg).request for i, row in enumerate(rows)]


def test_what_is_asked(artifact):
    """Raw text after BOS, a chat through the template; the row's toggle before the command's."""
    reader = Reader.open(artifact)

    def asked(rows, cfg) -> list[str]:
        ids = [encode_request(reader, request) for request in requests(rows, cfg)]
        return [reader.tokenizer.decode(tokens, skip_special=False) for tokens in ids]

    turn = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\ntwo and two<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert asked(ROWS, GenerateConfig(thinking="off")) == [
        "<|begin_of_text|>one and",
        turn.format("detailed thinking off"),
        turn.format("detailed thinking on"),
        "<|begin_of_text|>to",
        turn.format("detailed thinking off\n\nBe short."),
        "<|begin_of_text|>",
        turn.format("detailed thinking off"),
    ]
    system = [{"messages": [{"role": "system", "content": "Be short."}, *CHAT]}]
    for cfg, text in (
        (GenerateConfig(), "Be short."),
        (GenerateConfig(thinking="on"), "detailed thinking on\n\nBe short."),
    ):
        assert asked(system, cfg) == [turn.format(text)]


def test_rows_are_the_engines(artifact, whole):
    """Each chunk is completed by an engine, each row with settings and keys of its own."""
    mesh = make_mesh(CONFIG.mesh)
    arch, params = load_model(artifact, mesh)
    reader = Reader.open(artifact)
    tokenizer = reader.tokenizer
    found = read(whole)
    assert [(r["id"], r["sample"]) for r in found] == [
        (name, sample) for name in (1, "second", 3, 4, 5, 70, 7) for sample in (0, 1)
    ]
    own = [SamplingConfig(max_new_tokens=8)] * 7
    own[3] = SamplingConfig(temperature=0, max_new_tokens=5)
    own[5] = SamplingConfig(top_k=4, repetition_penalty=1.2, max_new_tokens=8)
    asked = requests(ROWS)
    assert [r.sampling for r in asked] == own
    prompts = [tuple(encode_request(reader, request)) for request in asked]
    for start in (0, 3, 6):
        jobs = [
            Job(prompts[place], own[place], job_key(row_seed(3, place), sample), tokenizer.eos_ids)
            for place in range(start, min(start + 3, 7))
            for sample in (0, 1)
        ]
        cfg = batch_config(reader, len(jobs), max(map(len, prompts)) + 8, 8)
        expected = complete(Engine(params, arch, cfg, mesh=mesh), jobs)
        for job, row, completion in zip(jobs, found[2 * start :], expected, strict=False):
            assert row["tokens"] == completion.tokens and row["num_tokens"] == len(completion.tokens)
            assert row["logprobs"] == completion.logprobs
            assert row["text"] == tokenizer.decode(completion.tokens)
            assert row["finish_reason"] == ("stop" if completion.finished else "length")
            assert row["prompt_tokens"] == len(job.prompt)
    assert found[6]["tokens"] == found[7]["tokens"] and len(found[6]["tokens"]) <= 5  # greedy
    assert found[0]["tokens"] != found[1]["tokens"]


def test_a_row_draws_by_its_place_alone(artifact, whole):
    """Neither the chunk nor what the other rows are changes a row, but for rounding."""
    found = read(whole)
    others = [{"prompt": "three"}, ROWS[1], {"prompt": "make"}, {"messages": CHAT, "seed": row_seed(3, 6)}]
    cfg = dataclasses.replace(CONFIG, chunk=2)
    rows = batch.answer(artifact, others, cfg)
    assert [row["tokens"] for row in rows[2:4]] == [row["tokens"] for row in found[2:4]]
    assert [row["tokens"] for row in rows[6:8]] == [row["tokens"] for row in found[12:14]]
    other = batch.answer(artifact, others[:2], dataclasses.replace(cfg, seed=4))
    assert [row["tokens"] for row in other] != [row["tokens"] for row in rows[:4]]
    assert len({row_seed(seed, place) for seed in range(8) for place in range(1000)}) > 7990


def test_reasoning_is_split_off(artifact):
    """What `AnswerStream` says of an answer (test_local.py) is what the row says."""
    tokenizer, one = load_tokenizer(artifact), batch.make_request({"prompt": "a"}, 0, 1, "row 1", CONFIG)
    text = "<think>two and\n two</think> three"
    answer = Answer(
        text, "two and\n two", "three", "stop", 9, 4, (), tuple(tokenizer.encode(text)), (-1.0,) * 9
    )
    [row] = batch._rows(one, [answer], GenerateConfig())
    assert row == {
        "id": 1,
        "sample": 0,
        "text": text,
        "reasoning": "two and\n two",
        "answer": "three",
        "finish_reason": "stop",
        "num_tokens": 9,
        "prompt_tokens": 4,
    }


def test_what_ends_and_forms_an_answer(artifact):
    """Fields of the configuration, and a row's own before them."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    cfg = GenerateConfig(
        SamplingConfig(max_new_tokens=40, temperature=0), AnswerConfig(json_schema=schema, top_logprobs=2)
    )
    free = batch.answer(artifact, [{"prompt": "one", "json_schema": None, "top_logprobs": 0}], cfg)[0]
    assert "top" not in free and free["text"]
    stop = free["text"][1:3]
    rows = batch.answer(
        artifact,
        [
            {"prompt": "one", "repetition_penalty": 1.5},
            {"prompt": "one", "json_schema": None, "stop": stop},
            {"messages": CHAT, "json_schema": None, "thinking": True, "thinking_budget": 0},
        ],
        cfg,
    )
    if rows[0]["finish_reason"] == "stop":
        assert isinstance(json.loads(rows[0]["answer"])["a"], int)
    assert rows[0]["answer"].startswith("{") and all(len(step) == 2 for step in rows[0]["top"])
    assert rows[1]["text"] == free["text"][: free["text"].index(stop)] and rows[1]["finish_reason"] == "stop"
    assert not rows[2]["reasoning"]


@pytest.mark.parametrize(
    "cut", ["nothing", "a line", "half a line", "a chunk", "a chunk and more", "the last byte"]
)
def test_a_cut_does_not_show(artifact, prompts, whole, tmp_path, cut):
    lines = whole.read_bytes().splitlines(keepends=True)
    kept, before = {
        "nothing": (b"", 0),
        "a line": (lines[0], 0),
        "half a line": (lines[0][:20], 0),
        "a chunk": (b"".join(lines[:6]), 6),
        "a chunk and more": (b"".join(lines[:9]) + lines[9][:5], 6),
        "the last byte": (whole.read_bytes()[:-1], 12),
    }[cut]
    out = tmp_path / "out.jsonl"
    out.write_bytes(kept)
    sidecar(out).write_bytes(sidecar(whole).read_bytes())
    counts = batch.run(artifact, prompts, out, CONFIG, quiet=True)
    assert counts["rows_before"] == before and counts["tokens"] > 0
    assert out.read_bytes() == whole.read_bytes()
    assert sidecar(out).read_bytes() == sidecar(whole).read_bytes()


def test_a_finished_file_is_left_alone(artifact, prompts, whole, monkeypatch):
    monkeypatch.setattr(Model, "load", lambda *_: pytest.fail("nothing is left to do"))
    before = whole.stat()
    counts = batch.run(artifact, prompts, whole, CONFIG, quiet=True)
    assert counts == {"prompts": 7, "rows": 14, "rows_before": 14, "tokens": 0}
    assert whole.stat().st_mtime_ns == before.st_mtime_ns


def test_the_output_of_another_run(artifact, prompts, whole, tmp_path):
    before = whole.read_bytes()
    other = write(tmp_path / "prompts.jsonl", ROWS[:-1])
    for source, cfg, differing in (
        (prompts, GenerateConfig(), "config.chunk, config.logprobs, config.max_batch, config.n"),
        (
            prompts,
            dataclasses.replace(CONFIG, answer=AnswerConfig(stop=("x",))),
            "differs in config.answer.stop",
        ),
        (other, CONFIG, "differs in prompts;"),
    ):
        with pytest.raises(ValueError, match=f"the output of another run, .*{differing}.* choose another"):
            batch.run(artifact, source, whole, cfg)
    foreign = write(tmp_path / "mine.jsonl", [{"text": "precious"}])
    with pytest.raises(ValueError, match=r"expected mine\.jsonl\.config\.json beside it, got none"):
        batch.run(artifact, prompts, foreign, CONFIG)
    moved = tmp_path / "moved.jsonl"
    lines = whole.read_bytes().splitlines(keepends=True)
    moved.write_bytes(lines[1] + lines[0])
    sidecar(moved).write_bytes(sidecar(whole).read_bytes())
    with pytest.raises(ValueError, match=r"moved\.jsonl:1: not the row that belongs there"):
        batch.run(artifact, prompts, moved, CONFIG)
    assert whole.read_bytes() == before and read(foreign) == [{"text": "precious"}]


def test_one_writer_at_a_time(artifact, prompts, whole, tmp_path):
    out = tmp_path / "out.jsonl"
    record = json.loads(sidecar(whole).read_text())
    with opened(out, record), pytest.raises(ValueError, match="another process writes it"):
        batch.run(artifact, prompts, out, CONFIG, quiet=True)
    assert out.read_bytes() == b""


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "prompts.jsonl: expected prompts, got none"),
        ('{"prompt": "a"}\n{"prompt"\n', "prompts.jsonl:2: expected one JSON object a line"),
        ('["a"]\n', "prompts.jsonl:1: expected a JSON object, got list"),
        ('\n{"promt": "a"}\n', "prompts.jsonl:2: promt: unknown field; did you mean 'prompt'?"),
        ('{"id": 1}\n', "prompts.jsonl:1: expected either prompt or messages, got id"),
        ('{"prompt": "a", "messages": []}\n', "expected either prompt or messages, got prompt, messages"),
        ('{"prompt": 3}\n', "prompts.jsonl:1: prompt: expected text, got 3"),
        ('{"prompt": "a", "thinking": true}\n', "expected thinking with messages, got it with prompt"),
        ('{"messages": []}\n', "prompts.jsonl:1: expected at least one message, got none"),
        ('{"messages": "hello"}\n', "prompts.jsonl:1: expected messages"),
        ('{"messages": [{"role": "robot", "content": "x"}]}\n', "prompts.jsonl:1: expected messages of role"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', "end before the assistant's"),
        (
            '{"prompt": "a", "temperature": "hot"}\n',
            "prompts.jsonl:1: temperature: expected float, got 'hot'",
        ),
        ('{"prompt": "a", "temperature": -1}\n', "prompts.jsonl:1: temperature: expected 0 or more, got -1"),
        (
            '{"prompt": "a", "temperature": NaN}\n',
            "prompts.jsonl:1: expected Unicode text and finite numbers",
        ),
        ('{"prompt": "\\ud800"}\n', "prompts.jsonl:1: expected Unicode text and finite numbers"),
        ('{"prompt": "a", "id": [1]}\n', "prompts.jsonl:1: id: expected text or a whole number, got [1]"),
        ('{"prompt": "a", "seed": -1}\n', "prompts.jsonl:1: seed: expected a number in [0, 2**32), got -1"),
        (
            '{"prompt": "a", "seed": true}\n',
            "prompts.jsonl:1: seed: expected a number in [0, 2**32), got True",
        ),
        ('{"prompt": "a", "stop": [""]}\n', "prompts.jsonl:1: stop: expected texts that are not empty"),
        ('{"prompt": "a", "stop": 3}\n', "prompts.jsonl:1: stop.0: expected str, got 3"),
        ('{"prompt": "a", "top_logprobs": 21}\n', "prompts.jsonl:1: top_logprobs: expected 0 to 20, got 21"),
        ('{"prompt": "a", "thinking_budget": -1}\n', "prompts.jsonl:1: thinking_budget: expected 0 or more"),
        ('{"prompt": "a", "json_schema": "x"}\n', "prompts.jsonl:1: json_schema: expected"),
        (
            '{"prompt": "a", "json_schema": {"type": "robot"}}\n',
            "prompts.jsonl:1: json_schema: expected a schema",
        ),
        (
            '{"prompt": "a", "tools": []}\n',
            "prompts.jsonl:1: expected tools with messages, got it with prompt",
        ),
        (
            '{"prompt": "a"}\n{"prompt": "b", "id": 1}\n',
            "prompts.jsonl:2: expected an id of its own, got 1 of",
        ),
        (
            '{"prompt": "a"}\n{"prompt": "%s"}\n' % ("ab " * CONTEXT),
            "prompts.jsonl:2: expected at most 127 tok",
        ),
    ],
)
def test_bad_rows(artifact, tmp_path, rows, message):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(rows)
    with pytest.raises(ValueError) as error:
        batch.run(artifact, prompts, tmp_path / "out.jsonl", CONFIG)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["prompts.jsonl"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 0}, "n: expected 1 or more, got 0"),
        ({"chunk": 0}, "chunk: expected 1 or more, got 0"),
        ({"seed": -1}, r"seed: expected a number in \[0, 2\*\*32\), got -1"),
    ],
)
def test_bad_configurations(values, message):
    with pytest.raises(ValueError, match=message):
        GenerateConfig(**values)


def test_the_command_writes_what_the_call_does(artifact, prompts, whole, tmp_path, capsys):
    out = tmp_path / "new" / "out.jsonl"
    code, said, progress = command(capsys, artifact, f"--prompts={prompts}", f"--out={out}", *FLAGS)
    assert (code, out.read_bytes()) == (0, whole.read_bytes())
    assert said.startswith(f"generate: {out} prompts=7 rows=14 rows_before=0 tokens=")
    assert [line.split("  ")[0] for line in progress.splitlines()] == [
        "generate 3/7",
        "generate 6/7",
        "generate 7/7",
    ]


def test_a_prompt_of_the_command_line(artifact, capsys):
    """A chat unless raw; flags are short for fields and win over them."""
    flags = ["--temperature=0", "--max_new_tokens=6", "--config.sampling.temperature=0.5"]
    cfg = GenerateConfig(SamplingConfig(temperature=0, max_new_tokens=6), thinking="off")
    for more, row in ((["--thinking=off"], {"messages": CHAT}), (["--raw"], {"prompt": "two and two"})):
        [wanted] = batch.answer(artifact, [row], cfg)
        code, said, note = command(capsys, artifact, "--prompt=two and two", *flags, *more)
        assert (code, said) == (0, wanted["text"] + "\n")
        assert ("1 of 1 cut off" in note) == (wanted["finish_reason"] == "length")
    code, said, _ = command(capsys, artifact, "--prompt=two and two", *flags, "--raw", "--n=2")
    assert said == f"[1/2] {wanted['text']}\n[2/2] {wanted['text']}\n"


def test_help(capsys):
    code, said, _ = command(capsys, "--help")
    assert code == 0 and "--prompts FILE" in said and "--thinking {on,off,none}" in said
    assert "sampling.top_p" in said and "samples of each prompt" in said


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompts={prompts}"], "--prompts needs --out=FILE.jsonl"),
        (["--prompts={prompts}", "--out={prompts}"], "expected another file than the prompts, got the same"),
        (["--prompts={prompts}.gone", "--out={tmp}/out"], "got no such file; check the path"),
        (["--prompts={prompts}", "--out={tmp}"], "expected a file, got something else"),
        (["--prompts={prompts}", "--out={tmp}/out", "--raw"], "--raw goes with --prompt;"),
        (["--prompt=x", "--out={tmp}/out"], "--out goes with --prompts;"),
        (["--prompt=x", "--raw", "--thinking=on"], "--thinking goes with a chat, not with --raw"),
        (["--prompt=x", "--prompts={prompts}"], "not allowed with argument"),
        ([], "one of the arguments --prompt --prompts is required"),
        (["--prompt=x", "--temperature=hot"], "sampling.temperature: expected float, got 'hot'"),
        (["--prompt=x", "--config.sampling.top=1"], "sampling.top: unknown key; did you mean 'top_p'?"),
        (["--prompt=x", "--config.mesh.data=3"], "mesh: expected axes that multiply to 8 devices"),
    ],
)
def test_bad_arguments(artifact, prompts, tmp_path, capsys, args, message):
    args = [arg.format(prompts=prompts, tmp=tmp_path) for arg in args]
    before = prompts.read_bytes()
    code, said, line = command(capsys, artifact, *args)
    assert (code, said) == (2, "") and message in line and line.count("\n") == 1
    assert prompts.read_bytes() == before and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("checkpoints", "expected checkpoints/<step>, got none"),
        ("arch.json", "no such architecture file"),
        ("tokenizer", "expected a fast tokenizer (tokenizer.json), got none"),
        ("params", "model"),
    ],
)
def test_a_damaged_artifact(artifact, prompts, tmp_path, capsys, lost, message):
    """Whatever is missing, the output is not begun."""
    damaged = tmp_path / "model"
    damaged.mkdir()
    for path in artifact.iterdir():
        if path.name != lost:
            (damaged / path.name).symlink_to(path)
    if lost == "params":
        (damaged / "checkpoints").unlink()
        (damaged / "checkpoints" / "0" / "params").mkdir(parents=True)
    out = tmp_path / "out.jsonl"
    code, _, line = command(capsys, damaged, f"--prompts={prompts}", f"--out={out}")
    assert code == 2 and message in line and line.count("\n") == 1
    assert os.listdir(tmp_path) == ["model"]


def test_processes_that_read_other_prompts(artifact, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "of_all", lambda record: [record, record | {"prompts": "0"}])
    with pytest.raises(ValueError, match="expected the same prompts and artifact in all processes"):
        batch.run(artifact, prompts, tmp_path / "out.jsonl", CONFIG)
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_a_kill_does_not_show(artifact, tmp_path):
    """SIGKILL three times, wherever it strikes."""
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"{i} and"} for i in range(400)])

    def start(out: Path) -> subprocess.Popen:
        args = [str(artifact), f"--prompts={prompts}", f"--out={out}", *FLAGS]
        return subprocess.Popen([sys.executable, "-m", "nemojax.cli", "generate", *args])

    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    assert start(one).wait(300) == 0
    assert len(read(one)) == 800
    for number in range(3):
        process, size = start(other), other.stat().st_size if other.exists() else 0
        deadline = time.monotonic() + 120
        while not other.exists() or other.stat().st_size <= size + 2000:
            assert process.poll() is None and time.monotonic() < deadline, number
            time.sleep(0.003)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert 0 < other.stat().st_size < one.stat().st_size
    assert start(other).wait(300) == 0
    assert other.read_bytes() == one.read_bytes()
