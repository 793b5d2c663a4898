"""The two generators are one: the same requests of an engine in process and of a server of the same model."""

import json
import math
import subprocess
import sys

import pytest

from nemojax.data.mixture import TextData
from nemojax.data.sources import Source
from nemojax.evaluate import run as evaluate
from nemojax.evaluate.latency import LatencyConfig
from nemojax.evaluate.tasks import TasksConfig, ask, ask_all
from nemojax.generate import batch
from nemojax.generate.batch import AnswerConfig, GenerateConfig
from nemojax.generate.engine import EngineConfig
from nemojax.generate.local import LocalGenerator, Model, Piece
from nemojax.generate.protocol import Answer, Request
from nemojax.generate.remote import RemoteConfig, RemoteGenerator
from nemojax.generate.sampling import SamplingConfig
from nemojax.rewards.problems import ProblemSet
from tests.serve.live import CHAT, make_artifact, serving

SHORT = SamplingConfig(max_new_tokens=16)
ADD = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
REQUESTS = [
    Request(prompt="one and", sampling=SHORT, n=3, seed=7),
    Request(tokens=(270, 40, 41, 42), sampling=SHORT, seed=2**32 - 1),
    Request(messages=tuple(CHAT), sampling=SHORT, seed=1, top_logprobs=3),
    Request(
        messages=tuple(CHAT), thinking=True, sampling=SamplingConfig(max_new_tokens=40), thinking_budget=6
    ),
    Request(
        messages=tuple(CHAT), thinking=False, sampling=SamplingConfig(0.7, 20, 0.9, 24, 0.02, 1.3), seed=3
    ),
    Request(messages=tuple(CHAT), sampling=SamplingConfig(max_new_tokens=60), seed=5, stop=("e", "o")),
    Request(
        messages=tuple(CHAT),
        thinking=False,
        sampling=SamplingConfig(0.5, max_new_tokens=80),
        json_schema={"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]},
        n=2,
    ),
    Request(
        messages=tuple(CHAT),
        thinking=False,
        sampling=SamplingConfig(0.5, max_new_tokens=80),
        tools=(ADD,),
        tool_choice={"type": "function", "function": {"name": "add"}},
    ),
]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return make_artifact(tmp_path_factory.mktemp("both"))


@pytest.fixture(scope="module")
def remote(artifact, tmp_path_factory):
    with (
        serving(artifact, tmp_path_factory.mktemp("cache"), "--config.engine.slots=8") as live,
        RemoteGenerator(
            RemoteConfig(f"{live.url}/v1", max_concurrency=4, timeout=120.0, tokens=True)
        ) as remote,
    ):
        yield remote


@pytest.fixture(scope="module")
def local(artifact) -> LocalGenerator:
    return LocalGenerator(Model.load(artifact), EngineConfig(slots=8))


def check_same(one: Answer, other: Answer) -> None:
    """All but the last digits of the log-probabilities, which come from other shapes."""
    assert _joined(one.text) == _joined(other.text)
    for name in ("reasoning", "content", "finish_reason", "num_tokens", "prompt_tokens", "tokens"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.tool_calls == other.tool_calls
    assert one.logprobs is not None and one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert [[text for text, _ in step] for step in one.top] == [
        [text for text, _ in step] for step in other.top
    ]
    for mine, theirs in zip(one.top, other.top, strict=True):
        assert [p for _, p in mine] == pytest.approx([p for _, p in theirs], abs=1e-4)


def _joined(text: str) -> str:
    """A server takes reasoning and content apart and drops the white space around them."""
    return "".join(text.split())


def test_the_same_answers(local, remote):
    for mine, theirs in zip(local.answer(REQUESTS), remote.answer(REQUESTS), strict=True):
        for one, other in zip(mine, theirs, strict=True):
            check_same(one, other)


@pytest.mark.parametrize("request_", [REQUESTS[i] for i in (0, 3, 4, 7)])
def test_the_same_pieces(local, remote, request_):
    said = []
    for generator in (local, remote):
        *pieces, answer = generator.pieces(request_)
        assert isinstance(answer, Answer)
        texts: dict[str, str] = {}
        for piece in pieces:
            assert isinstance(piece, Piece)
            if piece.text:
                texts[piece.kind] = texts.get(piece.kind, "") + piece.text
        counts = (answer.num_tokens, answer.prompt_tokens)
        said.append(
            (texts, _joined(answer.text), answer.content, answer.finish_reason, answer.tool_calls, counts)
        )
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(prompt="ab " * 2000), r"status 400 \(prompt: expected at most 1023 tokens, got"),
        (Request(messages=tuple(CHAT), json_schema={"type": "robot"}), r"status 400 \(.*json_schema"),
        (Request(messages=({"role": "robot", "content": "x"},)), "status 400"),
    ],
)
def test_a_refusal_is_told(remote, request_, message):
    with pytest.raises(ValueError, match=message):
        remote.answer([request_])


@pytest.mark.slow
def test_problems_are_asked_of_either(artifact, local, remote):
    cfg = TasksConfig(ProblemSet(("sum2",), 6), samples=2, max_new_tokens=8, max_batch=8, seed=3)
    model = local.model
    records = ask_all(model, cfg)
    assert records == ask(local, cfg)
    theirs = ask(remote, cfg)
    for record in (*records, *theirs):
        record["text"] = [_joined(text) for text in record["text"]]
    assert records == theirs
    assert [(r["thinking"], r["index"]) for r in records] == [(t, i) for t in (True, False) for i in range(6)]
    assert len({tuple(r["text"]) for r in records if r["thinking"]}) > 3
    other = ask(local, TasksConfig(ProblemSet(("sum2",), 6), samples=2, max_new_tokens=8, seed=4))
    assert [r["text"] for r in other if r["thinking"]] != [r["text"] for r in records if r["thinking"]]


@pytest.mark.slow
def test_a_stage_evaluates_a_server_beside_an_artifact(artifact, remote, tmp_path):
    """The same model twice: the same pass@1, and of the server nothing but that."""
    text = Source("words", "text", path=str(tmp_path / "text.txt"))
    cfg = evaluate.Config(
        models={"here": str(artifact), "there": remote.cfg.base_url},
        data=TextData(sources=(text,), heldout=(text,), length=32, batch_size=8),
        tasks=TasksConfig(ProblemSet(("sum2",), 4), max_new_tokens=8, max_batch=8),
        latency=LatencyConfig(batch=0),
        remote=RemoteConfig(timeout=120.0),
    )
    (tmp_path / "text.txt").write_text("one and two make three " * 200)
    rows = evaluate.run(cfg, tmp_path / "out")["models"]
    assert rows["there"].keys() == {"artifact", "tasks"} and "heldout" in rows["here"]
    assert rows["there"]["tasks"] == rows["here"]["tasks"]
    assert len((tmp_path / "out" / "tasks_there.jsonl").read_text().splitlines()) == 8


@pytest.mark.slow
def test_a_file_of_prompts_is_answered_by_either(artifact, remote, tmp_path):
    rows = [{"prompt": f"one {i}"} for i in range(6)]
    rows += [{"messages": CHAT, "seed": 5, "top_logprobs": 2}, {"messages": CHAT, "tools": [ADD]}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = GenerateConfig(SHORT, AnswerConfig(stop=("and",)), n=2, logprobs=True, max_batch=8)
    made = []
    for source, out in ((artifact, tmp_path / "local.jsonl"), (remote.base_url, tmp_path / "remote.jsonl")):
        batch.run(source, prompts, out, cfg, quiet=True)
        made.append([json.loads(line) for line in out.read_text().splitlines()])
    for mine, theirs in zip(*made, strict=True):
        for name in ("logprobs", "top"):
            assert _flat(mine.pop(name, [])) == pytest.approx(_flat(theirs.pop(name, [])), abs=1e-4)
        assert mine == theirs


def _flat(values) -> list[float]:
    """The numbers of nested lists; for a token that cannot come, OpenAI's servers write -9999."""
    if isinstance(values, list):
        return [number for value in values for number in _flat(value)]
    return [] if isinstance(values, str) else [values if math.isfinite(values) else -9999.0]


@pytest.mark.slow
def test_a_conversation_with_either(artifact, remote):
    """`nemojax chat` says the same, whoever answers."""
    said = []
    for source in (artifact, remote.base_url):
        done = subprocess.run(
            [sys.executable, "-m", "nemojax.cli", "chat", str(source), "--seed=3", "--max_new_tokens=12"],
            input="one and two\n/think on\nmake three\n",
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        said.append(done.stdout)
    assert said[0] == said[1] and said[0].strip()
