"""A study of distillation: what heals a pruned child, asked of the small parent of `study/compress.py`.

    nemojax run --config=configs/study/distill.py --workdir=runs/distill-study
    nemojax run --config=configs/study/distill.py:small --workdir=runs/distill-study-small  (minutes)

For each of three seeds the parent loses three quarters of its feed-forward channels and half of its heads, by
the activations of other texts, and the child learns the same tokens by one loss after another; a cache of the
parent's likeliest 100 tokens stands in for it once. `compare/table.md` has mean and spread.
"""

from ml_collections import ConfigDict

from nemojax.config import load_file

SEEDS = (0, 1, 2)
LM, NO_LOSS = "LM loss", {"kl": 0.0, "cosine": 0.0}
KL, BOTH, OFFLINE = "KL", "KL + cosine", "KL of the top 100, offline"
LOSSES = {
    LM: NO_LOSS | {"lm": 1.0},
    KL: {"cosine": 0.0},
    "cosine": {"kl": 0.0},
    BOTH: {},
    "KL of the top 10": {"cosine": 0.0, "top_k": 10},
    "KL of the top 100": {"cosine": 0.0, "top_k": 100},
    OFFLINE: {"cosine": 0.0, "top_k": 100},
    "reverse KL": NO_LOSS | {"reverse_kl": 1.0},
    "JSD": NO_LOSS | {"jsd": 1.0},
}


def get_config(argument: str = "") -> ConfigDict:
    """`argument`: "small" or nothing."""
    if argument not in ("", "small"):
        raise ValueError(f"expected small or nothing, got {argument!r}")
    small = argument == "small"
    parents = load_file("configs/study/compress.py" + (":small" if small else ""))["stages"]
    stages = {name: parents[name] for name in ("tokenizer", "parent")}
    common = {key: parents["study"]["config"][key] for key in ("data", "compute")}
    seeds = SEEDS[: 1 if small else None]
    for seed in seeds:
        stages |= healing(small, seed, common)
    return ConfigDict({"stages": stages | {"compare": {"config": comparison(seeds)}}})


def name_of(way: str, seed: int) -> str:
    return "".join(c if c.isalnum() else "_" for c in way.lower()) + f"-{seed}"


def healing(small: bool, seed: int, common: dict) -> dict:
    """One seed: a child, the teacher's cache, and a distillation by each loss."""
    steps = 20 if small else 150
    texts = common | {"data": common["data"] | {"seed": 100 + seed}}
    child, cache = f"child-{seed}", f"cache-{seed}"
    stages = {
        child: {
            "kind": "prune",
            "config": common
            | {
                "parent": "@parent",
                "data": common["data"] | {"seed": seed},
                "importance": {"batches": 2 if small else 6},
                "targets": {"ffn_ratio": 0.25, "kv_heads": 2, "multiple": 32},
            },
        },
        cache: {
            "kind": "cache",
            "config": texts | {"teacher": "@parent", "steps": steps, "top_k": 100},
        },
    }
    for way, loss in LOSSES.items():
        config = texts | {
            "student": f"@{child}",
            "teacher": "@parent",
            "loss": loss,
            "optim": {
                "name": "muon",
                "weight_decay": 0.0,
                "lr_final_ratio": 0.01,
                "lr": 4e-3,
                "warmup_steps": 4,
            },
            "fit": {"steps": steps, "log_every": 5 if small else 25},
            "seed": seed,
        }
        if way == OFFLINE:
            config |= {"teaching": {"cache": f"@{cache}"}}
        stages[name_of(way, seed)] = {"kind": "distill", "config": config}
    return stages


def comparison(seeds: tuple[int, ...]) -> dict:
    claims = [
        (KL, LM),
        (BOTH, LM),
        (BOTH, KL),
        (BOTH, "cosine"),
        (KL, "reverse KL"),
        (KL, "KL of the top 10"),
    ]
    return {
        "ways": {way: [f"@{name_of(way, seed)}" for seed in seeds] for way in LOSSES},
        "numbers": {
            "held-out loss": "heldout.loss",
            "KL to the parent": "heldout_kl.loss",
            "part of the gap closed": "gap_closed",
        },
        "claims": [
            {"better": better, "worse": worse, "number": number}
            for better, worse in claims
            for number in ("KL to the parent", "held-out loss")
        ],
    }
