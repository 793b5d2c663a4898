"""A conversation in the terminal, with an artifact or a server: streamed, with commands, Ctrl-C to stop.

Where standard input or output is no terminal it is a filter: a turn a line, the answers out, nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import re
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TextIO

from nemojax.config import field
from nemojax.data.chat import answer_with_thinking
from nemojax.data.tokenizer import END_THINK, THINK
from nemojax.generate.engine import EngineConfig
from nemojax.generate.local import LocalGenerator, Model, Piece
from nemojax.generate.protocol import Answer, Request
from nemojax.generate.remote import RemoteConfig, RemoteGenerator
from nemojax.generate.sampling import SamplingConfig
from nemojax.generate.sources import is_address
from nemojax.model.llama import Compute
from nemojax.sharding import MeshConfig, make_mesh

HELP = """\
/think on|off|none   reasoning on or off; none leaves the system text alone
/system TEXT         the system text; without TEXT there is none
/reset               a new conversation, with the same system text
/help, /quit         this; the end (also Ctrl-D)
//TEXT               says /TEXT
Ctrl-C stops an answer; what there is of it stays in the conversation."""
COMMANDS = ("/think", "/system", "/reset", "/help", "/quit")
PROMPT = "> "
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what could steer a terminal
_OVERFLOW = re.compile(r"expected (at most|fewer than) \d+ tokens|context", re.IGNORECASE)


@dataclass(frozen=True)
class ChatConfig:
    """How a conversation is answered."""

    sampling: SamplingConfig = field(
        SamplingConfig(temperature=0.6, top_p=0.95, max_new_tokens=1024), "how tokens are drawn"
    )
    thinking: Literal["on", "off"] | None = field(
        None, "on or off puts the toggle into the system text; none leaves the text alone"
    )
    thinking_budget: int | None = field(None, "tokens of reasoning at most; then it is closed")
    system: str = field("", "system text")
    seed: int | None = field(None, "of the first answer, one more for each that follows; none: by chance")
    engine: EngineConfig = field(EngineConfig(slots=1, decode_steps=2), "how an artifact generates")
    compute: Compute = field(Compute(), "precision")
    mesh: MeshConfig = field(MeshConfig(), "devices")
    remote: RemoteConfig = field(RemoteConfig(), "how to ask a server, where the artifact is an address")

    def __post_init__(self):
        if self.seed is not None and not 0 <= self.seed < 2**31:
            raise ValueError(f"seed: expected a number in [0, 2**31), got {self.seed}")
        if self.thinking_budget is not None and self.thinking_budget < 0:
            raise ValueError(f"thinking_budget: expected 0 or more, got {self.thinking_budget}")


class Talker(Protocol):
    """The part of both generators that is used here."""

    def pieces(self, request: Request) -> Generator[Piece | Answer, None, None]: ...


def run(artifact: str, cfg: ChatConfig) -> None:
    """Talks until the input ends. ValueError for an artifact, or the address of a server, that is none."""
    screen = Screen(sys.stdin, sys.stdout)
    if is_address(artifact):
        with RemoteGenerator(dataclasses.replace(cfg.remote, base_url=artifact)) as server:
            screen.note(f"{server.model()} at {server.base_url}; /help lists the commands")
            Chat(server, cfg, screen, interruptible=True).talk()
        return
    model = Model.load(artifact, cfg.compute, make_mesh(cfg.mesh))
    local = LocalGenerator(model, cfg.engine)
    screen.note(f"{artifact}, a context of {local.engine.capacity} tokens; /help lists the commands")
    Chat(local, cfg, screen, interruptible=False).talk()


class Screen:
    """Where it is said: on a terminal with a prompt, dimmed reasoning and notes; else the bare text."""

    def __init__(self, source: TextIO, out: TextIO):
        self.interactive = source.isatty() and out.isatty()
        self._source, self._out = source, out
        self._colours = out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._last: str = ""  # kind of the last piece
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (lines can be edited and come back with the arrow keys)

    def read(self) -> str:
        """The next line. EOFError at the end, KeyboardInterrupt for a Ctrl-C at the prompt."""
        if self.interactive:
            return input(PROMPT)
        line = self._source.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def note(self, text: str) -> None:
        """Something that is no answer: for whoever sits there."""
        if self.interactive:
            print(self._dim(text), file=self._out, flush=True)

    def tell(self, text: str) -> None:
        """Something that went wrong."""
        print(text, file=self._out, flush=True)

    def write(self, piece: Piece) -> None:
        if not piece.text:
            return
        text = _CONTROL.sub("\ufffd", piece.text) if self._out.isatty() else piece.text
        if piece.kind == "reasoning":
            begins = "" if self._colours or self._last == "reasoning" else THINK
            self._out.write(begins + self._dim(text))
        else:
            self._end_reasoning()
            self._out.write(text)
        self._last = piece.kind
        self._out.flush()

    def end(self) -> None:
        """The answer is over."""
        self._end_reasoning()
        self._last = ""
        print(file=self._out, flush=True)

    def _end_reasoning(self) -> None:
        if self._last == "reasoning":
            self._out.write("\n\n" if self._colours else END_THINK)
            self._last = ""

    def _dim(self, text: str) -> str:
        return f"{_DIM}{text}{_PLAIN}" if self._colours else text


class Chat:
    """A conversation: what was said, the system text, and the toggle.

    interruptible: the talker's iterator may be broken off anywhere by an exception. An engine's may not: in
    the middle of a step its cache is nobody's, so there a Ctrl-C waits for the end of the step.
    """

    def __init__(self, talker: Talker, cfg: ChatConfig, screen: Screen, interruptible: bool):
        self.messages: list[dict[str, Any]] = []
        self.system = cfg.system
        self.thinking = {"on": True, "off": False, None: None}[cfg.thinking]
        self._talker, self._cfg, self._screen = talker, cfg, screen
        self._interruptible = interruptible
        self._asked = 0

    def talk(self) -> None:
        """Until the input ends or /quit."""
        while True:
            try:
                line = self._screen.read().strip()
            except EOFError:
                self._screen.note("")
                return
            except KeyboardInterrupt:
                if not self._screen.interactive:
                    raise
                self._screen.note("\nCtrl-D or /quit ends the conversation")
                continue
            if line == "/quit":
                return
            if line.startswith("/") and not line.startswith("//"):
                self._command(line)
            elif line:
                self.say(line.removeprefix("/") if line.startswith("//") else line)

    def say(self, text: str) -> None:
        """One turn of the user's, and the answer, both kept. What cannot be answered is told and not kept."""
        turn = {"role": "user", "content": text}
        try:
            text.encode()
            answer = self._answer((*self.messages, turn))
        except (ValueError, OSError) as error:
            self._refuse(error)
            return
        if answer is not None:
            self.messages += [turn, {"role": "assistant", "content": answer}]

    def _answer(self, messages: tuple[dict[str, Any], ...]) -> str | None:
        """The answer as the conversation keeps it, streamed meanwhile. None if it was stopped before it
        began."""
        system = ({"role": "system", "content": self.system},) if self.system else ()
        first = secrets.randbits(31) if self._cfg.seed is None else self._cfg.seed
        request = Request(
            messages=(*system, *messages),
            thinking=self.thinking,
            sampling=self._cfg.sampling,
            seed=first + self._asked,
            thinking_budget=self._cfg.thinking_budget,
        )
        self._asked += 1
        said: dict[str, str] = {"reasoning": "", "content": ""}
        answer: Answer | None = None
        stopped = False
        with _interrupts(self._interruptible) as interrupted:
            pieces = self._talker.pieces(request)
            try:
                for piece in pieces:
                    if isinstance(piece, Answer):
                        answer = piece
                        continue
                    said[piece.kind] += piece.text
                    self._screen.write(piece)
                    if interrupted():
                        break
            except KeyboardInterrupt:
                pass
            finally:
                pieces.close()
                if any(said.values()) or answer is not None:
                    self._screen.end()
            stopped = interrupted() and answer is None
        if stopped and not self._screen.interactive:
            raise KeyboardInterrupt
        if stopped:
            self._screen.note("stopped" if any(said.values()) else "\nstopped")
        elif answer is not None and answer.finish_reason == "length":
            self._screen.note("cut off by max_new_tokens or the context; /reset starts a new conversation")
        if not any(said.values()) and stopped:
            return None
        reasoning = said["reasoning"].strip()
        return said["content"].strip() or (answer_with_thinking(reasoning, "") if reasoning else "")

    def _refuse(self, error: Exception) -> None:
        if isinstance(error, UnicodeError):
            error = ValueError(f"expected Unicode text ({error}); say it in other characters")
        elif _OVERFLOW.search(str(error)) and self.messages:
            why = " ".join(str(error).split())
            error = ValueError(
                f"this no longer fits the context ({why}); the conversation is kept as it was: say less, or "
                "start a new one with /reset"
            )
        if not self._screen.interactive:
            raise error
        self._screen.tell(" ".join(str(error).split()))

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        match name:
            case "/think" if rest in ("on", "off", "none"):
                self.thinking = {"on": True, "off": False, "none": None}[rest]
                self._screen.note(f"thinking: {rest}")
            case "/think":
                now = {True: "on", False: "off", None: "none"}[self.thinking]
                self._complain(f"/think: expected on, off or none, got {rest or 'nothing'}; it is {now}")
            case "/system":
                self.system = rest
                self._screen.note(f"system text: {rest or 'none'}")
            case "/reset" if not rest:
                self.messages.clear()
                self._screen.note("a new conversation")
            case "/help":
                self._screen.note(HELP)
            case _:
                near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else "/help lists the commands"
                self._complain(f"{line[:60]!r}: no such command; {hint} (to say it, begin with //)")

    def _complain(self, line: str) -> None:
        """About a command: told on a terminal; in a script an error, or its sense would change unseen."""
        if not self._screen.interactive:
            raise ValueError(line)
        self._screen.tell(line)


@contextlib.contextmanager
def _interrupts(raises: bool) -> Iterator[Callable[[], bool]]:
    """Takes over Ctrl-C: whether there was one, and, if it `raises`, also as KeyboardInterrupt, once."""
    seen = False

    def note(*_: object) -> None:
        nonlocal seen
        first, seen = not seen, True
        if raises and first:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, before)
