"""Learning-rate schedules and optax chains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax

from nemojax.config import field


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "muon"] = field(
        "adamw", "optimiser; muon takes matrices in blocks, AdamW the rest"
    )
    lr: float = field(1e-3, "peak learning rate")
    warmup_steps: int = field(0, "steps of linear warm-up from zero")
    schedule: Literal["cosine", "wsd", "constant"] = field(
        "cosine", "shape after warm-up; wsd: flat, then linear"
    )
    lr_final_ratio: float = field(0.1, "last learning rate over the peak")
    decay_fraction: float = field(0.2, "share of all steps that wsd spends decaying")
    weight_decay: float = field(0.1, "decoupled weight decay; norms have none")
    b1: float = field(0.9, "decay of the first moment (momentum for muon)")
    b2: float = field(0.95, "decay of the second moment")
    eps: float = field(1e-8, "added to the root of the second moment")
    clip_norm: float = field(1.0, "largest global gradient norm; 0 does not clip")

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"lr: expected a positive number, got {self.lr}")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction: expected a number in (0, 1], got {self.decay_fraction}")


def make_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by step: warm-up, then the chosen shape, ending at lr * lr_final_ratio."""
    last = config.lr * config.lr_final_ratio
    after = max(total_steps - config.warmup_steps, 1)
    match config.schedule:
        case "constant":
            main = optax.constant_schedule(config.lr)
        case "cosine":
            main = optax.cosine_decay_schedule(config.lr, after, config.lr_final_ratio)
        case "wsd":
            decay = max(1, round(total_steps * config.decay_fraction))
            main = optax.join_schedules(
                [optax.constant_schedule(config.lr), optax.linear_schedule(config.lr, last, decay)],
                [max(after - decay, 0)],
            )
    if not config.warmup_steps:
        return main
    # step 0 already moves: a first step of zero would waste a batch
    start = config.lr / (config.warmup_steps + 1)
    return optax.join_schedules(
        [optax.linear_schedule(start, config.lr, config.warmup_steps), main], [config.warmup_steps]
    )


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimiser with its schedule."""
    schedule = make_schedule(config, total_steps)
    match config.name:
        case "adamw":
            main = optax.adamw(
                schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decayed
            )
        case "muon":
            main = optax.contrib.muon(
                schedule,
                beta=config.b1,
                weight_decay=config.weight_decay,
                weight_decay_mask=decayed,
                adam_b1=config.b1,
                adam_b2=config.b2,
                adam_weight_decay=config.weight_decay,
                muon_weight_dimension_numbers=matrix_axes,
                consistent_rms=0.2,
            )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()
    return optax.chain(clip, main)


def restart_schedule(opt_state: Any) -> Any:
    """The same moments with the schedule at its beginning: the optimiser goes on into another phase."""

    def one(node: Any) -> Any:
        return node._replace(count=node.count * 0) if isinstance(node, optax.ScaleByScheduleState) else node

    return jax.tree.map(one, opt_state, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))


def decayed(params: Any) -> Any:
    """True for every weight but the norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _name(path) not in ("norm", "scale"), params)


# reduction axes, output axes; the leading layer axis is a batch of matrices
_MATRICES = {
    "q": ((1,), (2, 3)),
    "k": ((1,), (2, 3)),
    "v": ((1,), (2, 3)),
    "o": ((1, 2), (3,)),
    "linear": ((1,), (2,)),
    "gate": ((1,), (2,)),
    "up": ((1,), (2,)),
    "down": ((1,), (2,)),
}


def matrix_axes(params: Any) -> Any:
    """Muon's view of each stacked block weight; None (AdamW) for embeddings, head and norms."""

    def one(path: Any, _: Any) -> Any:
        axes = _MATRICES.get(_name(path))
        return optax.contrib.MuonDimensionNumbers(*axes) if axes else None

    return jax.tree_util.tree_map_with_path(one, params)


def _name(path: Any) -> str:
    return path[-1].key
