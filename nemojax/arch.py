"""Architectures as data: what every layer of a model is made of, and nothing about how it computes.

An `ArchSpec` is hashable (static under `jax.jit`) and round-trips through JSON. A layer is a pair of
sub-blocks, each a sum type, so that an impossible layer cannot be written: there is no flag that says
"no attention" beside a number of KV heads.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemojax.buckets import place

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention. `window`: sliding window in tokens (a query sees itself and the
    `window - 1` tokens before it); None attends to everything before."""

    num_kv_heads: int
    window: int | None = None

    def __post_init__(self):
        _positive(self, "num_kv_heads", self.num_kv_heads)
        if self.window is not None:
            _positive(self, "window", self.window)


@dataclass(frozen=True)
class SwiGLU:
    """Gated feed-forward: down(silu(gate(x)) * up(x)); `width` channels between."""

    width: int

    def __post_init__(self):
        _positive(self, "width", self.width)


@dataclass(frozen=True)
class Linear:
    """The sub-block replaced by one square matrix on the normed input; the residual is still added."""


@dataclass(frozen=True)
class NoOp:
    """The sub-block removed: no parameters, no norm, no residual add."""


AttnSpec = Attention | Linear | NoOp
FfnSpec = SwiGLU | Linear | NoOp


@dataclass(frozen=True)
class BlockSpec:
    """One layer: an attention sub-block, then a feed-forward sub-block."""

    attn: AttnSpec
    ffn: FfnSpec

    def __post_init__(self):
        if not isinstance(self.attn, Attention | Linear | NoOp):
            raise ValueError(f"BlockSpec.attn: expected Attention, Linear or NoOp, got {self.attn!r}")
        if not isinstance(self.ffn, SwiGLU | Linear | NoOp):
            raise ValueError(f"BlockSpec.ffn: expected SwiGLU, Linear or NoOp, got {self.ffn!r}")

    @property
    def is_empty(self) -> bool:
        return isinstance(self.attn, NoOp) and isinstance(self.ffn, NoOp)


@dataclass(frozen=True)
class Llama3Scaling:
    """Frequency-dependent RoPE scaling of Llama 3.1: wavelengths above `original_context /
    low_freq_factor` are divided by `factor`, those below `original_context / high_freq_factor` are
    kept, with a linear ramp between. Context in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding with base `theta`."""

    theta: float = 10000.0
    scaling: Llama3Scaling | None = None


@dataclass(frozen=True)
class Run:
    """Equal blocks next to each other once empty layers are skipped: stacked and scanned together.
    `layers` are their global indices, ascending, not always contiguous."""

    spec: BlockSpec
    layers: tuple[int, ...]


@dataclass(frozen=True)
class ArchSpec:
    """A decoder-only Llama-family architecture.

    `context` is the longest sequence in tokens; `dim` the residual width; `head_dim` need not be
    `dim / num_heads`. Empty layers stay in `blocks`, so that layer indices mean the same in a
    published map and here.
    """

    vocab_size: int
    dim: int
    num_heads: int
    head_dim: int
    blocks: tuple[BlockSpec, ...]
    context: int
    rope: Rope = Rope()
    norm_eps: float = 1e-5
    tie_embeddings: bool = False

    def __post_init__(self):
        for name in ("vocab_size", "dim", "num_heads", "head_dim", "context"):
            _positive(self, name, getattr(self, name))
        if self.head_dim % 2:
            raise ValueError(
                f"ArchSpec.head_dim: expected an even number (RoPE turns pairs), got {self.head_dim}"
            )
        for i, block in enumerate(self.blocks):
            match block.attn:
                case Attention(num_kv_heads=k) if self.num_heads % k:
                    raise ValueError(
                        f"layer {i}: expected KV heads dividing the {self.num_heads} query heads, got {k}"
                    )

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers that own a KV cache slot."""
        return tuple(i for i, b in enumerate(self.blocks) if isinstance(b.attn, Attention))

    def runs(self) -> tuple[Run, ...]:
        runs: list[Run] = []
        for i, block in enumerate(self.blocks):
            if block.is_empty:
                continue
            if runs and runs[-1].spec == block:
                runs[-1] = Run(block, runs[-1].layers + (i,))
            else:
                runs.append(Run(block, (i,)))
        return tuple(runs)

    def block_shapes(self, layer: int) -> dict[str, dict[str, tuple[int, ...]]]:
        """Shapes of one layer's weights: {"attn": {name: shape}, "ffn": {name: shape}}, absent when no-op."""
        return block_shapes(self, self.blocks[layer])

    def num_block_params(self) -> int:
        """Parameters in the blocks, without embedding, final norm and head."""
        return sum(count * block_params(self, spec) for spec, count in Counter(self.blocks).items())

    def num_params(self) -> int:
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return self.num_block_params() + embeddings + self.dim

    def kv_elements_per_token(self) -> int:
        """Cache elements (keys and values together) for one token over all layers."""
        kv = sum(b.attn.num_kv_heads for b in self.blocks if isinstance(b.attn, Attention))
        return 2 * kv * self.head_dim

    def replace(self, **changes: Any) -> ArchSpec:
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """A plain dict. Equal neighbouring layers are written once, with a count."""
        out: dict[str, Any] = {"format_version": FORMAT_VERSION}
        for field in dataclasses.fields(self):
            if field.name not in ("blocks", "rope"):
                out[field.name] = getattr(self, field.name)
        out["rope"] = dataclasses.asdict(self.rope)
        layers: list[dict[str, Any]] = []
        for block in self.blocks:
            entry = {"attn": _sub_to_json(block.attn), "ffn": _sub_to_json(block.ffn)}
            if layers and {k: layers[-1][k] for k in ("attn", "ffn")} == entry:
                layers[-1]["count"] += 1
            else:
                layers.append({"count": 1, **entry})
        out["blocks"] = layers
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ArchSpec:
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"architecture: expected format_version {FORMAT_VERSION}, got {version!r}; convert it first"
            )
        known = {f.name for f in dataclasses.fields(cls)} | {"format_version"}
        if unknown := sorted(set(data) - known):
            raise ValueError(
                f"architecture: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(known))}"
            )
        values = {k: v for k, v in data.items() if k not in ("format_version", "rope", "blocks")}
        rope = data.get("rope") or {}
        scaling = rope.get("scaling")
        blocks: list[BlockSpec] = []
        for entry in data["blocks"]:
            spec = BlockSpec(_attn_from_json(entry["attn"]), _ffn_from_json(entry["ffn"]))
            blocks += [spec] * entry.get("count", 1)
        return cls(
            blocks=tuple(blocks),
            rope=Rope(rope.get("theta", 10000.0), Llama3Scaling(**scaling) if scaling else None),
            **values,
        )

    def dumps(self) -> str:
        """JSON text with one line for each run of equal layers, for people to read and to diff."""
        data = self.to_json()
        blocks = ",\n    ".join(json.dumps(b) for b in data.pop("blocks"))
        head = json.dumps(data, indent=2)[:-2]
        return f'{head},\n  "blocks": [\n    {blocks}\n  ]\n}}\n'


def block_shapes(arch: ArchSpec, spec: BlockSpec) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of the weights of a block of kind `spec`; a no-op sub-block is absent."""
    d, n, h = arch.dim, arch.num_heads, arch.head_dim
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    match spec.attn:
        case Attention(num_kv_heads=k):
            shapes["attn"] = {"norm": (d,), "q": (d, n, h), "k": (d, k, h), "v": (d, k, h), "o": (n, h, d)}
        case Linear():
            shapes["attn"] = {"norm": (d,), "linear": (d, d)}
    match spec.ffn:
        case SwiGLU(width=f):
            shapes["ffn"] = {"norm": (d,), "gate": (d, f), "up": (d, f), "down": (f, d)}
        case Linear():
            shapes["ffn"] = {"norm": (d,), "linear": (d, d)}
    return shapes


def block_params(arch: ArchSpec, spec: BlockSpec) -> int:
    """Parameters of one block of kind `spec`, norms included."""
    return sum(math.prod(shape) for sub in block_shapes(arch, spec).values() for shape in sub.values())


def uniform(
    *,
    vocab_size: int,
    dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    ffn_width: int,
    context: int,
    head_dim: int | None = None,
    rope: Rope = Rope(),
    norm_eps: float = 1e-5,
    tie_embeddings: bool = False,
) -> ArchSpec:
    """An architecture whose layers are all equal, as published Llamas are."""
    block = BlockSpec(Attention(num_kv_heads), SwiGLU(ffn_width))
    return ArchSpec(
        vocab_size=vocab_size,
        dim=dim,
        num_heads=num_heads,
        head_dim=head_dim or dim // num_heads,
        blocks=(block,) * num_layers,
        context=context,
        rope=rope,
        norm_eps=norm_eps,
        tie_embeddings=tie_embeddings,
    )


def load_arch(path_or_name: str | os.PathLike) -> ArchSpec:
    """Reads an `arch.json`; a bare name such as `llama_3_1_8b` means one of the shipped files."""
    path = place(path_or_name)
    if not path.is_file():
        shipped = _shipped_dir() / f"{path.stem}.json"
        if not shipped.is_file():
            raise ValueError(
                f"{path}: no such architecture file; shipped ones are {', '.join(shipped_archs())}"
            )
        return ArchSpec.from_json(json.loads(shipped.read_text()))
    try:
        return ArchSpec.from_json(json.loads(path.read_text()))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an architecture file ({type(error).__name__}: {error})") from error


def shipped_archs() -> list[str]:
    return sorted(f.stem for f in _shipped_dir().glob("*.json"))


def _shipped_dir() -> Path:
    """Inside an installed package, beside it in a checkout."""
    inside = Path(__file__).parent / "configs" / "arch"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs" / "arch"


def describe(spec: AttnSpec | FfnSpec) -> str:
    """A sub-block in a word, for tables and messages: `kv4`, `kv4/w1024`, `ffn2048`, `linear`, `-`."""
    match spec:
        case Attention(num_kv_heads=k, window=w):
            return f"kv{k}" + (f"/w{w}" if w else "")
        case SwiGLU(width=f):
            return f"ffn{f}"
        case Linear():
            return "linear"
        case NoOp():
            return "-"


def _positive(owner: object, name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{type(owner).__name__}.{name}: expected a positive integer, got {value!r}")


def _sub_to_json(sub: AttnSpec | FfnSpec) -> dict[str, Any]:
    fields = {k: v for k, v in dataclasses.asdict(sub).items() if v is not None}
    return {"kind": type(sub).__name__.lower(), **fields}


def _attn_from_json(data: dict[str, Any]) -> AttnSpec:
    return _sub_from_json(data, {"attention": Attention, "linear": Linear, "noop": NoOp})


def _ffn_from_json(data: dict[str, Any]) -> FfnSpec:
    return _sub_from_json(data, {"swiglu": SwiGLU, "linear": Linear, "noop": NoOp})


def _sub_from_json(data: dict[str, Any], kinds: dict[str, type]) -> Any:
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in kinds:
        raise ValueError(f"architecture: expected kind to be one of {', '.join(kinds)}, got {kind!r}")
    return kinds[kind](**fields)
