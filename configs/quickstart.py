"""The whole pipeline on two CPU cores: a parent from scratch, compressed, healed, taught to reason, exported.

    nemojax run --config=configs/quickstart.py --workdir=runs/quickstart
    nemojax run --config=configs/quickstart.py:seed=1 --workdir=runs/quickstart-seed1
    nemojax run --config=configs/quickstart.py:small --workdir=runs/small     (two minutes, learns little)

The parent learns from the Python language reference (40% of its tokens) and from spelling words backwards,
short ones (`spell`) and long ones (`spell_long`). The child keeps under half of the parent's block
parameters. GRPO then practises the long words.

Measured with the first command (Python 3.11.7, jax 0.10.2, 2 cores, one seed, 442 s in all):

    child                     40.0% of the parent's block parameters
    held-out loss, nats       parent 1.461, child 1.712 (gap 0.251), distilled 1.482 (92% of the gap closed)
                              LM loss alone, equal tokens: 1.461 (100% closed; here it beats distillation)
    spell, pass@1 of 512      after SFT 99.8% thinking, 97.7% not; the commonest answer would score 0.2%
    spell_long, pass@1 of 512 thinking: SFT 92.0%, after GRPO 94.7%, paired gain 2.7 points [0.6, 4.9]
    not practised by GRPO     answers without thinking, both families: 1.5 points down [0.3, 2.7]
    decode, tokens/s          parent 18,400, child 25,900 (batch 16, f32)
"""

from ml_collections import ConfigDict

EASY, HARD = "spell", "spell_long"
COMPUTE = {"unroll": 4}
MUON = {"name": "muon", "weight_decay": 0.0, "lr_final_ratio": 0.01}
SHAPES = {
    "full": {"dim": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "ffn_width": 512},
    "small": {"dim": 64, "num_layers": 3, "num_heads": 2, "num_kv_heads": 2, "ffn_width": 512},
}


def get_config(argument: str = "") -> ConfigDict:
    """`argument`: comma-separated `small` and `seed=N`."""
    words = [word for word in argument.split(",") if word]
    seeds = [word.removeprefix("seed=") for word in words if word.startswith("seed=")]
    if unknown := [word for word in words if word != "small" and not word.startswith("seed=")]:
        raise ValueError(f"expected small or seed=N, got {unknown[0]!r}")
    small, seed = "small" in words, int(seeds[0]) if seeds else 0
    return ConfigDict({"stages": pretraining(small, seed) | compression(small, seed) | tuning(small, seed)})


def steps(full: int, small: bool) -> int:
    return max(4, full // 8) if small else full


def texts(small: bool, seed: int) -> list[dict]:
    """Real text, and problems in two forms: the bare answer, and the answer after its working."""
    problems = {"kind": "problems", "field": "both", "limit": 400 if small else 10000, "weight": 0.3}
    return [
        {"name": "pydoc", "kind": "pydoc", "weight": 0.4},
        *({"name": name, "path": name, "seed": seed} | problems for name in (EASY, HARD)),
    ]


def text_data(small: bool, seed: int) -> dict:
    rows = {"length": 128, "batch_size": 16, "heldout_batches": 8}
    return {"sources": texts(small, seed), "seed": seed} | rows


def heldout(small: bool, seed: int, *families: str) -> dict:
    return {"families": families, "count": 16 if small else 512, "split": "heldout", "seed": seed}


def pretraining(small: bool, seed: int) -> dict:
    sample = [
        source if source["kind"] == "pydoc" else source | {"limit": 400} for source in texts(small, seed)
    ]
    return {
        "tokenizer": {"config": {"sources": sample, "vocab_size": 512, "context": 256}},
        "pretrain": {
            "config": {
                "tokenizer": "@tokenizer",
                "shape": SHAPES["small" if small else "full"] | {"context": 256},
                "data": text_data(small, seed),
                "optim": MUON | {"lr": 1e-2, "warmup_steps": steps(25, small), "weight_decay": 0.02},
                "fit": {"steps": steps(500, small), "log_every": steps(50, small)},
                "compute": COMPUTE,
                "seed": seed,
            }
        },
    }


def compression(small: bool, seed: int) -> dict:
    """The child, healed twice with the same data: by its parent, and by the language-model loss alone."""
    compress = {
        "parent": "@pretrain",
        "data": text_data(small, seed),
        "space": {"kv_heads": [1], "ffn_ratios": [0.5], "multiple": 256},
        "bld": {"steps": steps(20, small)},
        "cost": {"timings": ["decode"], "timing_batch": 16},
        "budget": {"ratio": {"params": 0.45}},
        "compute": COMPUTE,
    }
    distill = {
        "student": "@compress",
        "teacher": "@pretrain",
        "data": text_data(small, seed) | {"seed": seed + 1},
        "optim": MUON | {"lr": 4e-3, "warmup_steps": steps(10, small)},
        "fit": {"steps": steps(200, small), "log_every": steps(20, small)},
        "compute": COMPUTE,
    }
    lm_only = distill | {"loss": {"kl": 0.0, "cosine": 0.0, "lm": 1.0}}
    return {
        "compress": {"config": compress},
        "distill": {"config": distill},
        "distill_lm": {"kind": "distill", "config": lm_only},
    }


def tuning(small: bool, seed: int) -> dict:
    easy = {"name": EASY, "num": 200 if small else 6000, "seed": seed}
    hard = {"name": HARD, "num": 200 if small else 300, "seed": seed, "weight": 0.1}
    rows = {"length": 128, "batch_size": 16, "long": "drop", "seed": seed}
    sampling = {"top_p_on": 1.0, "max_new_tokens": 80}
    sft = {
        "model": "@distill",
        "data": {"sources": [easy, hard]} | rows,
        "optim": MUON | {"lr": 6e-3, "warmup_steps": steps(20, small)},
        "fit": {"steps": steps(250, small), "log_every": steps(25, small)},
        "compute": COMPUTE,
    }
    rl = {
        "model": "@sft",
        "problems": {"families": [HARD], "count": 200 if small else 4000, "split": "train", "seed": seed},
        "validation": {"problems": heldout(small, seed, HARD), "thinking": "both"} | sampling,
        "rollout": {"thinking": "both", "max_new_tokens": 80}
        | {"num_prompts_per_step": 16, "num_generations_per_prompt": 8},
        "optim": {"lr": 4e-4, "schedule": "constant", "weight_decay": 0.0, "warmup_steps": 6},
        "fit": {"steps": steps(60, small), "log_every": 1},
        "seed": seed,
    }
    models = {"parent": "@pretrain", "child": "@compress", "distilled": "@distill"}
    evaluate = {
        "models": models | {"lm_only": "@distill_lm", "sft": "@sft", "rl": "@rl"},
        "data": text_data(small, seed),
        "tasks": {"problems": heldout(small, seed, EASY, HARD), "thinking": "both"} | sampling,
        "asked": ["sft", "rl"],
        "compute": COMPUTE,
    }
    return {
        "sft": {"config": sft},
        "rl": {"config": rl},
        "evaluate": {"config": evaluate},
        "export": {"config": {"artifact": "@rl"}},
        "report": {"config": {"pipeline": "@."}},
    }
