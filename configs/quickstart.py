"""The whole pipeline on two CPU cores: a parent from scratch, compressed, healed, taught to reason, exported.

nemojax run --config=configs/quickstart.py --workdir=runs/quickstart
nemojax run --config=configs/quickstart.py:seed=1 --workdir=runs/quickstart-seed1
nemojax run --config=configs/quickstart.py:small --workdir=runs/small     (a minute, learns little)
"""

from ml_collections import ConfigDict

EASY, HARD = "spell", "spell_long"
SMALL = {"dim": 64, "num_layers": 3, "num_heads": 2, "num_kv_heads": 2, "ffn_width": 512}
MUON = {"name": "muon", "weight_decay": 0.0, "lr_final_ratio": 0.01}
FULL = {"dim": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "ffn_width": 512}


def get_config(argument: str = "") -> ConfigDict:
    """`argument`: comma-separated `small` and `seed=N`."""
    words = [word for word in argument.split(",") if word]
    seed = next((int(word.removeprefix("seed=")) for word in words if word.startswith("seed=")), 0)
    small = "small" in words
    if unknown := [word for word in words if word != "small" and not word.startswith("seed=")]:
        raise ValueError(f"quickstart: expected small or seed=N, got {unknown[0]!r}")

    def steps(full: int) -> int:
        return max(4, full // 50) if small else full

    compute = {"unroll": 4}
    tasks = [
        {"name": name, "kind": "problems", "path": name, "field": "both", "limit": 400 if small else 10000}
        | {"seed": seed, "weight": 0.3}
        for name in (EASY, HARD)
    ]
    text = {"name": "pydoc", "kind": "pydoc", "weight": 0.4}
    data = {"sources": [text, *tasks], "length": 128, "batch_size": 16, "heldout_batches": 8, "seed": seed}
    held = {"families": [EASY, HARD], "count": 16 if small else 512, "split": "heldout", "seed": seed}
    models = {
        "parent": "@pretrain",
        "child": "@compress",
        "lm_only": "@distill_lm",
        "distilled": "@distill",
        "sft": "@sft",
        "rl": "@rl",
    }
    stages = {
        "tokenizer": {
            "config": {
                "sources": [text, *[t | {"limit": 400} for t in tasks]],
                "vocab_size": 512,
                "context": 256,
            }
        },
        "pretrain": {
            "config": {
                "tokenizer": "@tokenizer",
                "shape": (SMALL if small else FULL) | {"context": 256},
                "data": data,
                "optim": MUON | {"lr": 1e-2, "warmup_steps": steps(25), "weight_decay": 0.02},
                "fit": {"steps": steps(500), "log_every": steps(50)},
                "compute": compute,
                "seed": seed,
            }
        },
        "compress": {
            "config": {
                "parent": "@pretrain",
                "data": data,
                "space": {"kv_heads": [1], "ffn_ratios": [0.5], "multiple": 256},
                "bld": {"steps": steps(20)},
                "cost": {"timings": ["decode"], "timing_batch": 16},
                "budget": {"ratio": {"params": 0.45}},
                "compute": compute,
            }
        },
        "distill": {
            "config": {
                "student": "@compress",
                "teacher": "@pretrain",
                "data": data | {"seed": seed + 1},
                "optim": MUON | {"lr": 4e-3, "warmup_steps": steps(10)},
                "fit": {"steps": steps(200), "log_every": steps(20)},
                "compute": compute,
            }
        },
        "distill_lm": {
            "kind": "distill",
            "config": {
                "student": "@compress",
                "teacher": "@pretrain",
                "loss": {"kl": 0.0, "cosine": 0.0, "lm": 1.0},
                "data": data | {"seed": seed + 1},
                "optim": MUON | {"lr": 4e-3, "warmup_steps": steps(10)},
                "fit": {"steps": steps(200), "log_every": steps(20)},
                "compute": compute,
            },
        },
        "sft": {
            "config": {
                "model": "@distill",
                "data": {
                    "sources": [
                        {"name": EASY, "num": 200 if small else 6000, "seed": seed},
                        {"name": HARD, "num": 200 if small else 2000, "seed": seed, "weight": 0.3},
                    ],
                    "length": 128,
                    "batch_size": 16,
                    "long": "drop",
                    "seed": seed,
                },
                "optim": MUON | {"lr": 6e-3, "warmup_steps": steps(20)},
                "fit": {"steps": steps(250), "log_every": steps(25)},
                "compute": compute,
            }
        },
        "rl": {
            "config": {
                "model": "@sft",
                "problems": {
                    "families": [HARD],
                    "count": 200 if small else 4000,
                    "split": "train",
                    "seed": seed,
                },
                "validation": {
                    "problems": held | {"families": [HARD]},
                    "thinking": "on",
                    "top_p_on": 1.0,
                    "max_new_tokens": 80,
                },
                "rollout": {
                    "thinking": "on",
                    "max_new_tokens": 80,
                    "num_prompts_per_step": 16,
                    "num_generations_per_prompt": 8,
                },
                "optim": {"lr": 2e-4, "schedule": "constant", "weight_decay": 0.0, "warmup_steps": 6},
                "fit": {"steps": steps(60), "log_every": 1},
                "seed": seed,
            }
        },
        "evaluate": {
            "config": {
                "models": models,
                "data": data,
                "tasks": {"problems": held, "thinking": "both", "top_p_on": 1.0, "max_new_tokens": 80},
                "asked": ["sft", "rl"],
                "compute": compute,
            }
        },
        "export": {"config": {"artifact": "@rl"}},
        "report": {"config": {"pipeline": "@."}},
    }
    return ConfigDict({"stages": stages})
