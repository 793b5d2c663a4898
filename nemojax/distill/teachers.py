"""Who teaches: one or several frozen models, in a dtype and places of their own, or what one once said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nemojax.arch import ArchSpec, load_arch
from nemojax.buckets import place
from nemojax.checkpoints.artifact import load_model, load_params
from nemojax.checkpoints.digest import weights_digest
from nemojax.config import field, required
from nemojax.data.tokenizer import Tokenizer, load_tokenizer
from nemojax.data.vocabulary import shared_vocab, tokenizer_digest
from nemojax.distill.cache_store import TeacherCache
from nemojax.distill.losses import DistillWeights, Teacher, distill_loss
from nemojax.hosts import on_primary
from nemojax.model.llama import Compute, Params, param_shardings
from nemojax.stage import fingerprint
from nemojax.train import LossFn


@dataclass(frozen=True)
class OtherTeacher:
    teacher: str = required("artifact of a further teacher")
    share: float = field(1.0, "its share of the mixture, relative to the others'")

    def __post_init__(self):
        if self.share <= 0:
            raise ValueError(f"share: expected a positive number, got {self.share}")


@dataclass(frozen=True)
class Teaching:
    share: float = field(1.0, "the teacher's share of the mixture, where there are more")
    more: tuple[OtherTeacher, ...] = field(
        (), "further teachers: distributions are mixed, and hidden states compared with all, by share"
    )
    dtype: Literal["", "float32", "bfloat16"] = field("", "of the teachers' weights; empty: as stored")
    compute: Literal["", "float32", "bfloat16"] = field(
        "", "of the teachers' activations; empty: as the student's"
    )
    split: Literal["student", "tensor"] = field(
        "student",
        "teachers' weights: as the student's, or over tensor alone (more memory, nothing to gather)",
    )
    cache: str = field(
        "", "what the teacher once said, of the stage `cache`: its work directory, a folder, gs:// or s3://"
    )

    def __post_init__(self):
        if self.share <= 0:
            raise ValueError(f"share: expected a positive number, got {self.share}")
        if self.cache and self.more:
            raise ValueError(f"more: expected one teacher beside a cache, got {1 + len(self.more)}")


@dataclass(frozen=True)
class Teachers:
    """Teachers that fit a student. `shared`: how many ids are compared, 0 for the whole vocabulary."""

    paths: tuple[str, ...]
    archs: tuple[ArchSpec, ...]
    cfg: Teaching
    shared: int = 0

    def load(self, mesh: Mesh | None) -> Any:
        """The parameters of the one teacher, or a tuple of them, as `loss` takes them."""
        loaded = [self._load(path, arch, mesh) for path, arch in zip(self.paths, self.archs, strict=True)]
        return loaded[0] if len(loaded) == 1 else tuple(loaded)

    def loss(self, student: ArchSpec, weights: DistillWeights, compute: Compute, chunk: int = 0) -> LossFn:
        """The loss of a student whose `frozen` is what `load` gives."""
        shares = (self.cfg.share, *(other.share for other in self.cfg.more))
        # ids that they lack, or have another meaning for, are none of theirs
        archs = [a.replace(vocab_size=self.shared) if self.shared else a for a in self.archs]
        theirs = self.compute(compute)
        teachers = [Teacher(arch, share, theirs) for arch, share in zip(archs, shares, strict=True)]
        return distill_loss(student, teachers, weights, compute, chunk)

    def compute(self, student: Compute) -> Compute:
        """How the teachers compute beside a student: without a backward pass, and never in eight bits."""
        dtype = self.cfg.compute or student.dtype
        return replace(student, dtype=dtype, remat="none", matmul="default")

    def _load(self, path: str, arch: ArchSpec, mesh: Mesh | None) -> Params:
        dtype = self.cfg.dtype or None
        if mesh is None or mesh.size == 1:
            return load_params(path, arch, dtype=dtype)[1]
        places = param_shardings(arch, mesh)
        if self.cfg.split == "tensor":
            places = jax.tree.map(_over_tensor, places)
        return load_params(path, arch, dtype=dtype, shardings=places)[1]


def find_teachers(
    paths: Sequence[str], cfg: Teaching, arch: ArchSpec, tokenizer: Tokenizer, shared: int = 0
) -> Teachers:
    """The teachers of a student of this architecture and tokenizer, of which the first `shared` ids (0: all)
    are compared; ValueError for one that cannot be, or with which the student has fewer in common."""
    archs = []
    for path in paths:
        if not (place(path) / "arch.json").is_file():
            raise ValueError(f"{path}: expected an artifact with arch.json, got none; import a model first")
        archs.append(load_arch(place(path) / "arch.json"))
        _check_vocab(path, archs[-1], arch, tokenizer, shared)
    return Teachers(tuple(paths), tuple(archs), cfg, shared)


def _check_vocab(path: str, teacher: ArchSpec, arch: ArchSpec, tokenizer: Tokenizer, shared: int) -> None:
    theirs = load_tokenizer(path)
    if tokenizer_digest(theirs) == tokenizer_digest(tokenizer) and teacher.vocab_size == arch.vocab_size:
        return
    most = min(shared_vocab(tokenizer, theirs), teacher.vocab_size, arch.vocab_size)
    if not most:
        raise ValueError(
            f"{path}: expected the student's tokenizer ({tokenizer.path}), got one that cuts texts in "
            "another way; take a teacher of the same vocabulary"
        )
    if not 0 < shared <= most:
        here, there = (t.token(most) or "nothing" for t in (tokenizer, theirs))
        raise ValueError(
            f"{path}: expected the student's vocabulary ({arch.vocab_size} ids), got one of "
            f"{teacher.vocab_size} that is the same for {most} ids (then {there} there, {here} here); set "
            f"loss.tokens.shared to {most} to compare these"
        )


def check_cache(
    cache: TeacherCache,
    path: str,
    tokenizer: Tokenizer,
    *,
    data: str,
    length: int,
    rows: int,
    temperature: float,
    mesh: Mesh | None,
) -> None:
    """ValueError unless the cache is of the teacher at `path`, this tokenizer and these data (their
    identity), with `rows` rows at this temperature."""
    about = cache.told
    if about.artifact != on_primary(lambda: fingerprint(path)):
        # the files were moved or written again: their weights decide
        arch, params = load_model(path, mesh)
        if weights_digest(arch, params) != about.teacher:
            raise ValueError(
                f"{cache.url}: expected what {path} says, got a cache of another teacher; take the teacher "
                "that it is of, or write another"
            )
    if about.tokenizer != tokenizer_digest(tokenizer):
        raise ValueError(
            f"{cache.url}: expected the tokenizer {tokenizer.path}, got a cache of another; take the one "
            "that it is of, or write another"
        )
    if about.temperature != temperature:
        raise ValueError(
            f"{cache.url}: expected loss.temperature {temperature:g}, got a cache at {about.temperature:g}; "
            "set the one of the cache, or write another"
        )
    if (about.data, about.length) != (data, length):
        raise ValueError(
            f"{cache.url}: expected rows of {length} tokens of data {data}, got {about.length} of "
            f"{about.data}; use the data configuration of the cache, or write another"
        )
    if rows > cache.num_rows:
        raise ValueError(
            f"{cache.url}: expected {rows} rows, got {cache.num_rows}, which are "
            f"{cache.num_rows // about.batch_size} steps of {about.batch_size}; write a longer cache, or "
            "train for fewer steps (fit.steps)"
        )


def _over_tensor(place: NamedSharding) -> NamedSharding:
    """The same place, but for every axis except tensor, over which there are copies."""
    axes = [(entry,) if isinstance(entry, str) else entry or () for entry in place.spec]
    return NamedSharding(place.mesh, PartitionSpec(*("tensor" if "tensor" in a else None for a in axes)))
