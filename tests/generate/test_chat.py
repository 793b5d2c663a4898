"""The terminal conversation: as a filter, and on a real terminal with its keys."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from pexpect import TIMEOUT, fdpexpect

from nemojax import cli
from nemojax.arch import uniform
from nemojax.checkpoints.artifact import save_params
from nemojax.data.tokenizer import train_tokenizer
from nemojax.generate.chat import Chat, ChatConfig, Screen
from nemojax.generate.engine import EngineConfig
from nemojax.generate.local import LocalGenerator, Model
from nemojax.generate.protocol import Request
from nemojax.generate.remote import RemoteConfig, RemoteGenerator
from nemojax.generate.sampling import SamplingConfig
from nemojax.model.llama import init_params
from tests.environment import QUICK_COMPILATION
from tests.generate.unreliable import Server, wait_until

CONTEXT = 1024
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
ENV = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {
    "TERM": "xterm",
    "XLA_FLAGS": QUICK_COMPILATION,
}


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
    ends = np.asarray(tokenizer.eos_ids)
    params["head"]["weight"] = params["head"]["weight"].at[ends].set(0)  # greedy goes on to the end
    return save_params(folder / "model", arch, params, tokenizer_dir=folder / "tokenizer")


def talk(server: Server, text: str, cfg: ChatConfig | None = None) -> tuple[str, Chat]:
    """What a script hears that says this, and the conversation."""
    out = io.StringIO()
    with RemoteGenerator(RemoteConfig(server.url, "toy", backoff=0.001, timeout=60.0)) as generator:
        chat = Chat(generator, cfg or ChatConfig(), Screen(io.StringIO(text), out), interruptible=True)
        chat.talk()
    return out.getvalue(), chat


def said(server: Server) -> list[list[tuple[str, str]]]:
    return [[(m["role"], m["content"]) for m in body["messages"]] for body in server.bodies]


def test_a_script(server):
    """A turn a line, the bare answers out; every request holds what was said before."""
    out, _ = talk(server, "hello\n\nand again\n")
    assert out == "hello 0\nand again 0\n"
    first = [("user", "hello")]
    assert said(server) == [first, [*first, ("assistant", "hello 0"), ("user", "and again")]]
    assert server.bodies[0]["max_tokens"] == 1024 and server.bodies[0]["temperature"] == 0.6


def test_commands(server):
    lines = [
        "/system Be brief.",
        "a",
        "/think on",
        "b",
        "/reset",
        "/think off",
        "c",
        "/system",
        "/think none",
        "//d",
    ]
    talk(server, "\n".join([*lines, "/quit", "never said"]))
    brief, a = ("system", "Be brief."), [("user", "a"), ("assistant", "a 0")]
    toggled = ("system", "detailed thinking {}\n\nBe brief.")
    assert said(server) == [
        [brief, a[0]],
        [("system", toggled[1].format("on")), *a, ("user", "b")],
        [("system", toggled[1].format("off")), ("user", "c")],
        [("user", "c"), ("assistant", "c 0"), ("user", "/d")],
    ]


def test_settings(server):
    sampling = SamplingConfig(temperature=0, max_new_tokens=7)
    talk(server, "a\nb\n", ChatConfig(sampling, "on", thinking_budget=9, system="Hm.", seed=5))
    assert [body["seed"] for body in server.bodies] == [5, 6]
    for body in server.bodies:
        assert (body["temperature"], body["max_tokens"], body["thinking_token_budget"]) == (0, 7, 9)
        assert body["messages"][0]["content"] == "detailed thinking on\n\nHm."
    server.bodies.clear()
    talk(server, "a\nb\n")
    talk(server, "a\nb\n")
    assert len({body["seed"] for body in server.bodies}) == 4


def chunk(finish: str | None = None, **delta) -> dict:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def test_reasoning_in_a_script(server):
    """As `nemojax generate` prints it; the conversation keeps the answer alone."""
    server.chunks = [
        chunk(reasoning_content="two "),
        chunk(reasoning_content="and"),
        chunk(content="three"),
        chunk("stop"),
    ]
    out, chat = talk(server, "a\n")
    assert out == "<think>two and</think>three\n"
    assert [m["content"] for m in chat.messages] == ["a", "three"]
    server.chunks = [chunk(reasoning_content="two"), chunk("length")]
    out, chat = talk(server, "a\n")
    assert out == "<think>two</think>\n" and chat.messages[1]["content"] == "<think>two</think>"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/thnk on", "'/thnk on': no such command; did you mean /think?"),
        ("/xyz", "no such command; /help lists the commands"),
        ("/think maybe", "/think: expected on, off or none, got maybe; it is none"),
        ("/reset now", "'/reset now': no such command; did you mean /reset?"),
        ("\udc80", "expected Unicode text"),
    ],
)
def test_what_a_script_may_not_say(server, line, message):
    with pytest.raises(ValueError) as error:
        talk(server, f"a\n{line}\nb\n")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert len(server.bodies) == 1


def test_what_a_server_refuses(server):
    """One that is full is told apart; what was said stays as it was."""
    full = (400, {"error": {"message": "maximum context length is 64 tokens"}}, {})
    for script, message in (
        ([None, full], "kept as it was: say less, or start a new one with /reset"),
        ([404], "404"),
    ):
        server.script = script
        with pytest.raises(ValueError, match=message):
            talk(server, "a\nb\n")


def test_an_artifact_in_a_script(artifact):
    """Standard input is a pipe: the answers are those of the generator, with the same seeds."""
    args = [str(artifact), "--seed=3", "--max_new_tokens=12", "--thinking=off", "--system=1"]
    done = subprocess.run(
        [sys.executable, "-m", "nemojax.cli", "chat", *args],
        input="one and two\nmake three\n",
        capture_output=True,
        text=True,
        env=ENV,
    )
    assert (done.returncode, done.stderr) == (0, "")
    generator = LocalGenerator(Model.load(artifact), EngineConfig(slots=1, decode_steps=2))
    messages: list[dict] = [{"role": "system", "content": "1"}]
    wanted = ""
    for number, text in enumerate(("one and two", "make three")):
        messages.append({"role": "user", "content": text})
        sampling = SamplingConfig(0.6, 0, 0.95, 12)
        request = Request(messages=tuple(messages), thinking=False, sampling=sampling, seed=3 + number)
        [[answer]] = generator.answer([request])
        assert answer.reasoning is None
        wanted += answer.content + "\n"
        messages.append({"role": "assistant", "content": answer.content})
    assert done.stdout.replace("\r", "") == wanted.replace("\r", "") and wanted.strip()


# Makes the terminal on its standard input its own, as a login does: only then Ctrl-C reaches it.
LOGIN = (
    "import fcntl, os, sys, termios\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """`nemojax chat` on a terminal of its own."""

    def __init__(self, *args: object):
        command = [sys.executable, "-m", "nemojax.cli", "chat", *map(str, args)]
        mine, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOGIN, *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env=ENV,
        )
        os.close(theirs)
        self.child = fdpexpect.fdspawn(mine, timeout=120, encoding="utf-8", codec_errors="replace")
        self.expect("/help lists the commands")
        self.prompt()

    def expect(self, text: str) -> str:
        """What came before the text."""
        self.child.expect_exact(text)
        return self.child.before or ""

    def prompt(self) -> str:
        return self.expect("\r\n> ")

    def say(self, line: str) -> None:
        self.child.sendline(line)
        self.expect(f"{line}\r\n")

    def press(self, key: str) -> None:
        self.child.send(chr(ord(key) - ord("a") + 1))

    def press_until(self, key: str, text: str) -> None:
        """Presses again where nothing came of it, as a person does: a signal between Python's prompt and its
        wait for a key is only seen with the next one."""
        for _ in range(12):
            self.press(key)
            if self.child.expect_exact([text, TIMEOUT], timeout=10) == 0:
                return
        raise AssertionError(f"{text!r} did not come")

    def end(self) -> int:
        code = self.process.wait(60)
        self.child.close()
        return code


def test_a_terminal(server):
    """Text appears as it comes, reasoning is dimmed, and the commands do what they say."""
    terminal = Terminal(server.url)
    server.chunks = [
        chunk(reasoning_content="two"),
        chunk(reasoning_content=" and"),
        chunk(content="three"),
        chunk(content=" \x1b[31mred"),
        chunk("stop"),
    ]
    server.pause_after = 3
    terminal.say("hello")
    terminal.expect(f"{DIM}two{PLAIN}{DIM} and{PLAIN}\r\n\r\nthree")
    wait_until(lambda: server.slow == 1)  # the rest has not been sent yet
    server.release.set()
    assert terminal.prompt() == " \ufffd[31mred"  # a model does not steer the terminal
    server.chunks, server.pause_after = None, -1
    terminal.say("/think on")
    assert terminal.prompt() == f"{DIM}thinking: on{PLAIN}"
    terminal.say("/system Be brief.")
    terminal.prompt()
    terminal.say("more")
    assert terminal.prompt() == "more 0"
    terminal.say("/help")
    assert "Ctrl-C stops an answer" in terminal.prompt()
    terminal.say("/thnik off")
    assert (
        terminal.prompt() == "'/thnik off': no such command; did you mean /think? (to say it, begin with //)"
    )
    terminal.say("/reset")
    assert terminal.prompt() == f"{DIM}a new conversation{PLAIN}"
    terminal.say("new")
    terminal.prompt()
    system = ("system", "detailed thinking on\n\nBe brief.")
    red = ("assistant", "three \x1b[31mred")
    assert said(server) == [
        [("user", "hello")],
        [system, ("user", "hello"), red, ("user", "more")],
        [system, ("user", "new")],
    ]
    terminal.press_until("c", "Ctrl-D or /quit ends the conversation")
    terminal.press("d")
    assert terminal.end() == 0


def test_stopping_an_answer_of_a_server(server):
    """It hangs up, keeps what there is, and nothing where there is nothing."""
    terminal = Terminal(server.url)
    server.pause_after = 2
    terminal.say("a b c")
    terminal.expect("a b")
    terminal.press("c")
    assert "stopped" in terminal.prompt()
    wait_until(lambda: server.cut_off == 1)
    server.script = ["slow"]
    terminal.say("nothing")
    wait_until(lambda: server.slow == 2)
    terminal.press("c")
    assert "stopped" in terminal.prompt()
    server.pause_after = -1
    terminal.say("go on")
    terminal.prompt()
    assert said(server)[-1] == [("user", "a b c"), ("assistant", "a b"), ("user", "go on")]
    server.script = [400]
    terminal.say("bad")
    assert "status 400 (no luck: 400); change the request" in terminal.prompt()
    terminal.say("/quit")
    assert terminal.end() == 0


def test_stopping_an_answer_of_an_artifact(artifact):
    """The engine goes on after it; a conversation that fills the context says so, and /reset helps."""
    terminal = Terminal(artifact, "--temperature=0", "--config.engine.decode_steps=1")
    terminal.say("one")
    terminal.child.expect(r"[^\r\n]{3}")
    terminal.press("c")
    assert f"{DIM}stopped{PLAIN}" in terminal.prompt()
    terminal.say("q" * 1200)
    line = terminal.prompt()
    assert "this no longer fits the context" in line and "/reset" in line and "\n" not in line
    terminal.say("/reset")
    terminal.prompt()
    terminal.child.sendline("and")
    terminal.prompt()
    terminal.press("d")
    assert terminal.end() == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{none}"], "expected checkpoints/<step>, got none"),
        (["{artifact}", "--temperature=-1"], "sampling.temperature: expected 0 or more, got -1"),
        (["{artifact}", "--thinking=maybe"], "invalid choice: 'maybe'"),
        (["{artifact}", "--model=x"], "--model goes with a server's address"),
        (["{artifact}", "--config.seed=-1"], "seed: expected a number in [0, 2**31), got -1"),
        (["{artifact}", "--config.sed=1"], "sed: unknown key; did you mean 'seed'?"),
        (["http://127.0.0.1:9/v1", "--config.remote.max_retries=0"], "ConnectError"),
        ([], "the following arguments are required: ARTIFACT|URL"),
    ],
)
def test_bad_arguments(artifact, tmp_path, capsys, args, message):
    args = [arg.format(artifact=artifact, none=tmp_path) for arg in args]
    code = cli.main(["chat", *args])
    out, line = capsys.readouterr()
    assert (code, out) == (2, "") and message in line and line.count("\n") == 1


def test_help(capsys):
    """The defaults are the chat's own."""
    assert cli.main(["chat", "--help"]) == 0
    out = capsys.readouterr().out
    assert "/think on|off|none" in out and "--system" in out
    defaults = {
        line.split()[0]: line.split()[1] for line in out.splitlines() if line.startswith("  sampling.")
    }
    assert defaults["sampling.max_new_tokens"] == "1024" and defaults["sampling.temperature"] == "0.6"
