"""A study of compression: the claims of the Puzzle papers, asked of a small parent trained here.

    nemojax run --config=configs/study/compress.py --workdir=runs/study
    nemojax run --config=configs/study/compress.py:small --workdir=runs/study-small  (minutes)

A ten-layer parent learns from the Python language reference and from four families of problems, each with
its working. The stage `study` then builds a library for each of three seeds (other calibration
texts, other distillation data), searches children at three budgets by several methods, scores and libraries,
and measures them on held-out text and problems; see its `table.md`, and `notebooks/README.md` for what came.
"""

from ml_collections import ConfigDict

FAMILIES = ("spell", "sort3", "sum2", "letters")
COMPUTE = {"unroll": 2}
MUON = {"name": "muon", "weight_decay": 0.0, "lr_final_ratio": 0.01}


def get_config(argument: str = "") -> ConfigDict:
    """`argument`: "small" or nothing."""
    if argument not in ("", "small"):
        raise ValueError(f"expected small or nothing, got {argument!r}")
    small = argument == "small"
    return ConfigDict({"stages": parent(small) | study(small)})


def texts(small: bool, limit: int = 0) -> list[dict]:
    problems = {"kind": "problems", "field": "trace", "weight": 0.15}
    problems["limit"] = limit or (400 if small else 6000)
    return [
        {"name": "pydoc", "kind": "pydoc", "weight": 0.4},
        *({"name": name, "path": name} | problems for name in FAMILIES),
    ]


def data(small: bool) -> dict:
    return {"sources": texts(small), "length": 128, "batch_size": 16, "heldout_batches": 4}


def parent(small: bool) -> dict:
    shape = {"dim": 128, "num_layers": 10, "num_heads": 4, "num_kv_heads": 4, "ffn_width": 512}
    if small:
        shape |= {"dim": 64, "num_layers": 4, "ffn_width": 256}
    steps = 60 if small else 1500
    return {
        "tokenizer": {"config": {"sources": texts(small, 400), "vocab_size": 512, "context": 256}},
        "parent": {
            "kind": "pretrain",
            "config": {
                "tokenizer": "@tokenizer",
                "shape": shape | {"context": 256},
                "data": data(small),
                "optim": MUON | {"lr": 1e-2, "warmup_steps": max(4, steps // 20), "weight_decay": 0.02},
                "fit": {"steps": steps, "log_every": max(5, steps // 30), "checkpoint_every": 500},
                "compute": COMPUTE,
            },
        },
    }


def study(small: bool) -> dict:
    """All of the library and of the searches is of one parent; each seed draws its own data."""
    return {
        "study": {
            "config": {
                "parent": "@parent",
                "data": data(small),
                "problems": {"families": FAMILIES, "count": 16 if small else 128},
                "space": {"kv_heads": [2, 1], "attn_linear": True, "ffn_ratios": [0.75, 0.5, 0.25]}
                | {"ffn_linear": True, "multiple": 32},
                "bld": {"steps": 6 if small else 120, "optim": {"lr": 2e-3, "warmup_steps": 6}},
                "calibration": 2 if small else 6,
                "ratios": [0.8, 0.65, 0.5] if small else [0.75, 0.6, 0.45],
                "heal": {
                    "ratio": 0.5 if small else 0.45,
                    "ways": ["mip", "greedy", "random", "uniform", "noop_only", "mip first weights"],
                    "steps": 4 if small else 150,
                    "optim": MUON | {"lr": 4e-3, "warmup_steps": 4 if small else 10},
                },
                "extras": {"fused": "1-3" if small else "3-8"},
                "seeds": [0, 1] if small else [0, 1, 2],
                "compute": COMPUTE,
            }
        }
    }
