"""Continuous batching over a cache of slots: jobs come and go at any time, each step serves all of them.

The host decides who is where; the compiled programs (programs.py) only compute. Shapes are rounded up, so
that a handful of programs serves everything: rows, lengths of chunks, and positions that are attended to.
What else is in the batch changes nothing in a sequence within one set of shapes, bitwise.

A slot keeps what it has read after its job is done. A job whose prompt begins in the same way as what some
slot holds copies that part instead of reading it, and jobs with the same prompt read it together, once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from nemojax.arch import ArchSpec
from nemojax.config import field
from nemojax.generate import programs
from nemojax.generate.jobs import MAX_TOP_LOGPROBS, Event, Job
from nemojax.generate.programs import FAR, Chunk, Emitted, First, How, Packed, State
from nemojax.generate.sampling import Report
from nemojax.generate.sequence import Sequence
from nemojax.generate.slots import SlotTable
from nemojax.generate.speculate import Speculation, make_draft
from nemojax.model.cache import init_cache
from nemojax.model.llama import Compute, Params
from nemojax.sharding import use_mesh

_GROWTH = 4  # from one size to the next, of programs that serve few rows, keys or tokens
_SMALL = 16  # the shortest chunk and the fewest stop ids that programs are compiled for


@dataclass(frozen=True)
class EngineConfig:
    """How sequences share the devices. What is generated depends on none of it, up to rounding."""

    slots: int = field(32, "sequences served at once")
    context: int = field(0, "tokens that a slot holds, prompt and answer; 0: the model's context")
    cache_dtype: Literal["compute", "bfloat16", "float8_e4m3fn", "int8"] = field(
        "compute", "numbers of the KV cache; the 8-bit ones keep a scale for each position and head"
    )
    prefill_chunk: int = field(256, "tokens of a prompt that are read at once, so that others need not wait")
    prefill_tokens: int = field(512, "tokens of all prompts that are read at once")
    decode_steps: int = field(8, "tokens generated between two looks at who came and who left")
    interleave: bool = field(True, "generate while prompts are read; false reads all waiting prompts first")
    elastic: bool = field(True, "use a smaller program while few slots are busy")
    reuse: int = field(16, "shortest beginning of a prompt, in tokens, to take from another slot; 0 never")
    min_keys: int = field(64, "positions attended to at least; doubled as sequences grow")
    logprobs: Report = field(
        "sampled", "log-probabilities of the distribution sampled from, or of the model before cuts"
    )
    speculation: Speculation = field(Speculation(), "tokens proposed and verified together")

    def __post_init__(self):
        for name in ("slots", "prefill_chunk", "prefill_tokens", "decode_steps", "min_keys"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        for name in ("context", "reuse"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """Sequences that there are programs for, ascending."""
        few = [_GROWTH**i for i in range(16) if _GROWTH**i < self.slots] if self.elastic else []
        return (*few, self.slots)


@dataclass
class EngineStats:
    """Counters since the engine was made; tokens and calls of programs."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    steps: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0


class Engine:
    """Serves jobs on one model. Not for several threads at once.

    `params` may be stacked or split by layer. `draft`: a smaller model with the same vocabulary, which
    proposes tokens when the configuration's speculation says so.
    """

    def __init__(
        self,
        params: Params,
        arch: ArchSpec,
        cfg: EngineConfig = EngineConfig(),
        *,
        compute: Compute = Compute(),
        mesh: jax.sharding.Mesh | None = None,
        draft: tuple[Params, ArchSpec] | None = None,
    ):
        self.arch, self.cfg, self.stats = arch, cfg, EngineStats()
        self.capacity = min(cfg.context or arch.context, arch.context)
        self._mesh, self._compute = mesh, compute
        dtype = compute.dtype if cfg.cache_dtype == "compute" else cfg.cache_dtype
        with use_mesh(mesh):
            self._params, split = programs.prepare(params, compute, mesh)
            self._state = State(init_cache(arch, cfg.slots, self.capacity, jnp.dtype(dtype), split), None)
            self._draft = make_draft(draft, arch, cfg.speculation, cfg.slots, self.capacity, compute, mesh)
        self._table = SlotTable(cfg.slots)
        self._waiting: deque[Sequence] = deque()
        self._events: list[Event] = []
        self._next = 0

    @property
    def has_work(self) -> bool:
        return bool(self._table.owners or self._waiting or self._events)

    @property
    def num_running(self) -> int:
        return len(self._table.owners)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, job: Job) -> int:
        """The job's number, which its events carry. ValueError for a prompt that is empty, fills the context
        or has an id outside the vocabulary."""
        self.check(job)
        limit = min(job.sampling.max_new_tokens, self.capacity - len(job.prompt))
        sequence = Sequence.make(self._next, job, limit, self.cfg.speculation)
        self._next += 1
        self._waiting.append(sequence)
        return sequence.id

    def check(self, job: Job) -> None:
        """ValueError if `submit` would refuse the job."""
        if not job.prompt:
            raise ValueError("prompt: expected at least one token, got none; start it with BOS")
        if len(job.prompt) >= self.capacity:
            raise ValueError(
                f"prompt: expected fewer than {self.capacity} tokens (the context), got "
                f"{len(job.prompt)}; shorten it"
            )
        if min(job.prompt) < 0 or max(job.prompt) >= self.arch.vocab_size:
            raise ValueError(
                f"prompt: expected ids below {self.arch.vocab_size} (the vocabulary), got "
                f"{max(job.prompt)}; use the tokenizer that belongs to the model"
            )
        if not 0 <= job.top_logprobs <= MAX_TOP_LOGPROBS:
            raise ValueError(
                f"top_logprobs: expected 0 to {MAX_TOP_LOGPROBS}, got {job.top_logprobs}; ask for fewer"
            )

    def cancel(self, job_id: int) -> None:
        """The job ends without further events; unknown and finished ones are left alone."""
        self._events = [event for event in self._events if event.job != job_id]
        for sequence in (*self._waiting, *self._table.owners.values()):
            if sequence.id == job_id:
                self.stats.cancelled += 1
                if sequence.slot < 0:
                    self._waiting.remove(sequence)
                else:
                    self._free(sequence)

    def step(self) -> list[Event]:
        """One round: waiting jobs into free slots, a chunk of prompts, a few tokens for every sequence.
        Returns what has happened since the last one, in order; [] when there is nothing to do."""
        with use_mesh(self._mesh):
            self._admit()
            owners = self._table.owners.values()
            reading = [s for s in owners if s.is_reading]
            if reading:
                self._read(reading)
            running = [s for s in owners if s.is_running]
            if running and (self.cfg.interleave or not reading):
                self._advance(running, bool(reading))
        events, self._events = self._events, []
        return events

    # Places: a slot for each job, with as much of its prompt as some slot holds already.

    def _admit(self) -> None:
        while self._waiting and not self._table.full:
            sequence = self._waiting.popleft()
            leader = next((s for s in self._table.owners.values() if s.reads_for(sequence)), None)
            if leader is None:
                self._settle(sequence)
            else:
                self._table.occupy(sequence, self._table.unused())
                sequence.leader, sequence.position = leader, len(sequence.job.prompt)
                leader.twins.append(sequence)

    def _settle(self, sequence: Sequence) -> None:
        """Gives a sequence a slot that holds the beginning of its prompt, and leaves it the rest to read."""
        prompt = sequence.job.prompt
        slot, source, shared = self._table.choose(prompt, self.cfg.reuse)
        self._table.occupy(sequence, slot)
        if source != slot:
            self._fork([(source, slot)], shared)
        sequence.position = sequence.cached = shared
        sequence.pending = list(prompt[shared:])
        self.stats.cached_tokens += shared

    def _free(self, sequence: Sequence) -> None:
        self._table.free(sequence, self.stats.steps)
        if sequence.leader is not None:
            sequence.leader.twins.remove(sequence)
        elif sequence.twins:  # cancelled while it read for others: the next of them goes on
            heir, *others = sequence.twins
            del self._table.owners[heir.slot]
            heir.leader, heir.twins = None, others
            for twin in others:
                twin.leader = heir
            self._settle(heir)

    def _fork(self, pairs: ListOf[tuple[int, int]], length: int) -> None:
        """The first positions of some slots into others, [(from, to), ...]."""
        room = 1 if len(pairs) == 1 else self.cfg.slots
        from_M, to_M = np.asarray([*pairs, *[(0, FAR)] * (room - len(pairs))], np.int32).T
        keys = self._keys(length)
        self._state = programs.fork(self._state, from_M, to_M, keys=keys)
        if self._draft:
            self._draft.fork(from_M, to_M, keys)

    # Shapes: what is rounded up to what.

    def _rows(self, running: ListOf[Sequence]) -> tuple[list[Sequence | None], np.ndarray | None]:
        """(who stands in each row, the slot of each row or None where they are the slots themselves)."""
        size = next(size for size in self.cfg.row_sizes if size >= len(running))
        if size == self.cfg.slots:
            rows: list[Sequence | None] = [None] * self.cfg.slots
            for sequence in running:
                rows[sequence.slot] = sequence
            return rows, None
        idle = size - len(running)
        slots = np.asarray([*(s.slot for s in running), *[0] * idle], np.int32)
        return [*running, *[None] * idle], slots

    def _keys(self, length: int) -> int:
        keys = self._round_up(length, self.cfg.min_keys)
        # a part of the cache is cut out first: that pays when it is at most half of the whole
        return keys if 2 * keys <= self.capacity else self.capacity

    def _chunk(self, length: int) -> int:
        return min(self._round_up(min(length, self.cfg.prefill_chunk), _SMALL), self.cfg.prefill_chunk)

    def _round_up(self, length: int, size: int) -> int:
        """In large steps where programs are compiled while somebody waits for them."""
        while size < length:
            size *= _GROWTH if self.cfg.elastic else 2
        return size

    def _how(self, sequences: ListOf[Sequence]) -> How:
        return How(
            self.arch,
            self._compute,
            any(s.job.sampling.truncates for s in sequences),
            MAX_TOP_LOGPROBS if any(s.job.top_logprobs for s in sequences) else 0,
            self.cfg.logprobs,
            self.cfg.decode_steps,
        )

    def _pack(self, sequences: ListOf[Sequence | None]) -> Packed:
        """Rows of a program; None is an idle one."""
        busy = [s for s in sequences if s is not None]
        room = 2
        while room < max((len(s.job.stop_ids) for s in busy), default=0):
            room *= 4
        return programs.pack(
            [
                s
                and (
                    s.tokens[-1] if s.tokens else 0,
                    s.position,
                    s.left,
                    s.job.sampling,
                    s.job.key,
                    s.job.stop_ids,
                )
                for s in sequences
            ],
            room,
        )

    def _allowed(self, sequences: ListOf[Sequence | None]) -> np.ndarray | None:
        """[B, V]; None where no grammar forbids anything."""
        if not any(s and s.allowed is not None for s in sequences):
            return None
        everything = np.ones(self.arch.vocab_size, bool)
        return np.stack([everything if s is None or s.allowed is None else s.allowed for s in sequences])

    # Rounds of programs.

    def _read(self, reading: ListOf[Sequence]) -> None:
        """One chunk of the prompts that have waited longest and are of one size."""
        size = self._chunk(len(reading[0].pending))
        most = max(1, min(self.cfg.prefill_tokens // size, self.cfg.slots))
        group = [s for s in reading if self._chunk(len(s.pending)) == size][:most]
        rows = 1 if self.cfg.elastic and len(group) == 1 else most
        chunk = Chunk(
            np.zeros((rows, size), np.int32), *(np.zeros(rows, np.int32) for _ in Chunk._fields[1:])
        )
        for r, sequence in enumerate(group):
            part = sequence.pending[:size]
            chunk.tokens_RC[r, : len(part)] = part
            chunk.start_R[r], chunk.length_R[r], chunk.slot_R[r] = sequence.position, len(part), sequence.slot
        ends = [(r, s) for r, s in enumerate(group) if len(s.pending) <= size]
        asked = [(r, s) for r, end in ends for s in (end, *end.twins)]
        keys = self._keys(int((chunk.start_R + chunk.length_R).max()))
        first = self._first(asked, rows) if asked or self.cfg.elastic else None
        how = self._how([s for _, s in asked])
        self._state, emitted = programs.extend(self._params, self._state, chunk, first, how=how, keys=keys)
        if self._draft:
            self._draft.extend(chunk, keys)
        self.stats.steps += 1
        for r, sequence in enumerate(group):
            sequence.position += int(chunk.length_R[r])
            self.stats.prompt_tokens += int(chunk.length_R[r])
            del sequence.pending[:size]
        if emitted is not None and asked:
            self._release_twins([end for _, end in ends])
            self._accept([s for _, s in asked], emitted, after_reading=True)

    def _first(self, asked: ListOf[tuple[int, Sequence]], rows: int) -> First:
        room = rows if len(asked) <= rows and not self.cfg.elastic else self.cfg.slots
        idle = room - len(asked)
        sequences: list[Sequence | None] = [*(s for _, s in asked), *[None] * idle]
        seen_MV = None
        if self._remember():
            seen_MV = np.zeros((room, self.arch.vocab_size), bool)
            for m, (_, sequence) in enumerate(asked):
                seen_MV[m, [*sequence.job.prompt, *sequence.tokens]] = True
        return First(
            np.asarray([*(r for r, _ in asked), *[0] * idle], np.int32),
            np.asarray([*(s.slot for _, s in asked), *[FAR] * idle], np.int32),
            self._pack(sequences),
            self._allowed(sequences),
            seen_MV,
        )

    def _remember(self) -> bool:
        """Whether some job's distribution depends on what occurred; makes or drops the room for it."""
        wanted = any(s.job.sampling.penalises for s in self._table.owners.values())
        if wanted != (self._state.seen_BV is not None):
            shape = (self.cfg.slots, self.arch.vocab_size)
            self._state = self._state._replace(seen_BV=jnp.zeros(shape, bool) if wanted else None)
        return wanted

    def _release_twins(self, ends: ListOf[Sequence]) -> None:
        """What was read for several jobs is copied into the slots of the others."""
        pairs = [(end.slot, twin.slot) for end in ends for twin in end.twins]
        if pairs:
            self._fork(pairs, max(end.position for end in ends))
        for end in ends:
            for twin in end.twins:
                twin.leader, twin.cached = None, end.position
                self.stats.cached_tokens += end.position
            end.twins = []

    def _advance(self, running: ListOf[Sequence], reading: bool) -> None:
        """A few tokens for every sequence that has its prompt in the cache."""
        rows, slot_B = self._rows(running)
        self._remember()
        self.stats.steps += 1
        constrained = any(s.constraint for s in running)
        if self.cfg.speculation.kind != "none" and not constrained and self._verify(running, rows, slot_B):
            return
        steps = 1 if reading or constrained else self.cfg.decode_steps
        if self.cfg.speculation.kind != "none":
            steps = min(steps, self.cfg.speculation.tokens)
        steps = min([steps, *(s.thinking.room for s in running if s.thinking)])
        longest = max(s.position + min(steps, s.left) for s in running) + 1
        leave = 0
        if self._waiting:
            wanted = 1 if self.cfg.interleave else min(max(1, self.cfg.slots // 8), len(self._waiting))
            leave = max(0, len(running) - wanted) if self._table.full else 0
        self._state, emitted = programs.decode(
            self._params,
            self._state,
            self._pack(rows),
            np.int32(steps),
            np.int32(leave),
            slot_B,
            self._allowed(rows),
            how=self._how(running),
            keys=self._keys(longest),
        )
        self._accept(rows, emitted)

    def _verify(
        self, running: ListOf[Sequence], rows: ListOf[Sequence | None], slot_B: np.ndarray | None
    ) -> bool:
        """A step over proposals; False where there are none."""
        most = self.cfg.speculation.tokens
        keys = self._keys(max(s.position for s in running) + most + 2)
        packed = self._pack(rows)
        proposed_BT, num_B = np.zeros((len(rows), most), np.int32), np.zeros(len(rows), np.int32)
        if self._draft:
            proposed_BT = self._draft.propose(packed, slot_B, keys, most)
        for b, sequence in enumerate(rows):
            if sequence is None:
                continue
            num_B[b] = min(most, sequence.left - 1, sequence.thinking.room - 1 if sequence.thinking else most)
            if sequence.ngrams:
                found = sequence.ngrams.propose(int(num_B[b]))
                num_B[b] = len(found)
                proposed_BT[b, : len(found)] = found
        if not num_B.any():
            return False
        self._state, emitted = programs.verify(
            self._params, self._state, packed, proposed_BT, num_B, slot_B, how=self._how(running), keys=keys
        )
        counts = self._accept(rows, emitted)
        self.stats.proposed_tokens += int(num_B.sum())
        self.stats.accepted_tokens += int(np.maximum(counts - 1, 0).sum())
        return True

    # What came out.

    def _accept(
        self, rows: ListOf[Sequence | None], emitted: Emitted, after_reading: bool = False
    ) -> np.ndarray:
        """New tokens to their sequences, in one copy from the device; returns how many came for each row."""
        count_B, tokens_KB, logps_KB, ids_KBC, top_KBC = jax.device_get(emitted)
        for b, sequence in enumerate(rows):
            if sequence is None or not count_B[b]:
                continue
            n, top = int(count_B[b]), []
            if sequence.job.top_logprobs:
                c = sequence.job.top_logprobs
                top = [
                    list(zip(i, p, strict=True))
                    for i, p in zip(ids_KBC[:n, b, :c].tolist(), top_KBC[:n, b, :c].tolist(), strict=True)
                ]
            logps = logps_KB[:n, b].tolist()
            event = sequence.take(tokens_KB[:n, b].tolist(), logps, top, after_reading)
            self._events.append(event)
            self.stats.generated_tokens += len(event.tokens)
            if event.finish:
                self.stats.finished += 1
                self._free(sequence)
            elif closing := sequence.close_thinking():
                self._events.append(closing)
        return count_B
