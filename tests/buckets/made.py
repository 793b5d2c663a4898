"""What the tests of buckets work on, and what they wait for."""

import socket
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from nemojax import pretrain
from nemojax.arch import ArchSpec
from nemojax.config import from_dict

TEXTS = {"length": 64, "batch_size": 8, "heldout_batches": 1}


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition, process, log, seconds=120.0):
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < limit, Path(log).read_text()[-2000:]
        time.sleep(0.05)


@dataclass(frozen=True)
class Model:
    folder: Path
    arch: ArchSpec
    params: dict


def equal(a, b) -> bool:
    same = jax.tree.map(
        lambda x, y: x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)), a, b
    )
    return all(jax.tree.leaves(same))


def pretraining(tokenizer, **fit) -> pretrain.Config:
    shape = {"dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "ffn_width": 32, "context": 128}
    values = {
        "tokenizer": str(tokenizer),
        "shape": shape,
        "data": {"length": 64, "batch_size": 8, "heldout_batches": 1},
        "fit": {"steps": 4, "log_every": 1, "checkpoint_every": 2} | fit,
    }
    return from_dict(pretrain.Config, values)


def recipe(model, folder: Path, **fit) -> Path:
    """A recipe file of `pretraining`, for processes of their own."""
    path = folder / "recipe.py"
    cfg = pretraining(model.folder, **fit)
    path.write_text(
        f"from nemojax.config import from_dict\nfrom nemojax.pretrain import Config\n\n\ndef get_config():\n"
        f"    return {{'tokenizer': {cfg.tokenizer!r}, 'shape': {vars(cfg.shape)!r},\n"
        f"        'data': {{'length': 64, 'batch_size': 8, 'heldout_batches': 1}}, 'fit': {fit!r}}}\n"
    )
    return path
