"""A pipeline's directory as the stages leave it, written by hand: a report reads nothing else."""

import json
from pathlib import Path
from typing import Any

from nemojax.arch import ArchSpec, Attention, BlockSpec, Linear, NoOp, SwiGLU, uniform

PARENT = uniform(vocab_size=64, dim=32, num_layers=4, num_heads=4, num_kv_heads=4, ffn_width=512, context=64)
CHILD = PARENT.replace(
    blocks=(
        PARENT.blocks[0],
        BlockSpec(Attention(2), SwiGLU(256)),
        BlockSpec(NoOp(), Linear()),
        BlockSpec(Linear(), NoOp()),
    )
)
EVIL = "<script>alert(1)</script> <b>&amp;"


def write_pipeline(root: Path) -> Path:
    """A finished one with every kind of stage; the baseline of distillation is called `aaa_lm`."""
    root.mkdir(parents=True)
    (root / "pipeline.json").write_text('{"format_version": 1}')
    heldout = {"loss": 1.0, "pydoc": 1.5, "add": 0.5}
    curve = [{"step": s, "train/loss": 4.0 / s, "performance/tokens_per_second": 10.0} for s in (1, 2, 3)]
    curve.append({"step": 3, "validation/loss": 1.0, "validation/pydoc": 1.5})
    write_stage(root, "pretrain", "pretrain", [], result={"heldout": heldout}, arch=PARENT, metrics=curve)
    write_stage(
        root, "compress", "compress", ["pretrain"], config={"parent": "/elsewhere/pretrain"}, arch=CHILD,
        result={"block_params_ratio": 0.5, "num_params": 7, "parent_num_params": 14,
                "bld": {"ffn-ffn256": {"first": [0.5, 0.3], "last": [0.2, 0.1]}}},
    )  # fmt: skip
    solution = {"layers": [{"layer": i, "score": 0.01 * i} for i in range(4)]}
    (root / "compress" / "solution.json").write_text(json.dumps(solution))
    for name, kl, closed in (("distill", 1.0, 0.75), ("aaa_lm", 0.0, 0.4)):
        write_stage(
            root, name, "distill", ["compress", "pretrain"], arch=CHILD,
            config={"loss": {"kl": kl, "cosine": kl, "lm": 1 - kl, "temperature": 2.0}},
            result={"heldout_before": {"loss": 1.4}, "heldout": {"loss": 1.1},
                    "heldout_teacher": {"loss": 1.0}, "gap_nats": 0.4, "gap_closed": closed, "tokens": 2048},
            metrics=[{"step": 1, "train/loss": 0.5, "train/kl": 0.4, "train/cosine": None}],
        )  # fmt: skip
    write_stage(root, "sft", "sft", ["distill"], arch=CHILD, result={"heldout": {"loss": 0.7}}, metrics=curve)
    passed = {"on": {"all": {"pass@1": 0.5, "prompts": 64}}}
    gain = {"pass@1": 0.125, "low": 0.08, "high": 0.17}
    write_stage(
        root, "rl", "rl", ["sft"], arch=CHILD,
        metrics=[{"step": 1, "train/reward": 0.4, "train/accuracy/on": 0.3}],
        result={"before": passed, "after": {"on": {"all": {"pass@1": 0.625, "prompts": 64}}},
                "gain": {"all": gain, "on": gain}},
    )  # fmt: skip
    _write_evaluation(root, heldout)
    write_stage(root, ".export", "export", ["rl"], result={"path": "export"})
    return root


def _write_evaluation(root: Path, heldout: dict[str, float]) -> None:
    stages = {"parent": "pretrain", "child": "compress", "lm_only": "aaa_lm", "distilled": "distill"}
    stages |= {"sft": "sft", "rl": "rl"}
    rows = {}
    for name in sorted(stages):
        arch = PARENT if name == "parent" else CHILD
        summary = {
            "pass@1": 0.8 if name in ("sft", "rl") else 0.0,
            "prompts": 100,
            "verifier_error_rate": 0.0,
        }
        rows[name] = {
            "artifact": f"/elsewhere/{stages[name]}",
            "num_params": arch.num_params(),
            "num_block_params": arch.num_block_params(),
            "kv_elements_per_token": arch.kv_elements_per_token(),
            "heldout": heldout,
            "latency": {"prefill_ms": 12.5, "decode_tokens_per_second": 1500.0},
            "tasks": {mode: {"add": summary, "all": summary} for mode in ("on", "off")},
        }
    recall = {"recall": 0.25, "samples": 4}
    rows["rl"]["long_context"] = {"single": {"512": recall, "1024": {"recall": 1.0, "samples": 4}}}
    rows["lm_only"].pop("tasks")
    rows["lm_only"].pop("latency")
    comparison = {
        "before": "rl",
        "after": "parent",
        "thinking": "on",
        "pass@1": -0.8,
        "low": -0.9,
        "high": -0.7,
    }
    write_stage(
        root, "evaluate", "evaluate", list(stages.values()), config={"compute": {"dtype": "bfloat16"}},
        result={"models": rows, "comparisons": [comparison]},
    )  # fmt: skip
    talk = [
        {"model": m, "family": "add", "thinking": True, "prompt": f"1+1 {EVIL}", "reference": "2",
         "text": f"<think>one and one {EVIL}</think>2 {EVIL}", "accuracy": 1.0}
        for m in ("rl", "parent")
    ]  # fmt: skip
    talk.append(talk[0] | {"model": "sft", "text": "<think>never ends", "accuracy": None})
    lines = "\n".join(map(json.dumps, talk)) + '\n{"model": "cut sho'
    (root / "evaluate" / "conversations.jsonl").write_text(lines)


def write_stage(
    root: Path,
    name: str,
    kind: str,
    inputs: list[str],
    *,
    config: dict[str, Any] | None = None,
    result: dict[str, Any] | None = None,
    arch: ArchSpec | None = None,
    metrics: list[dict[str, Any]] | None = None,
) -> None:
    """One stage's work directory; without a result it is half done."""
    path = root / name
    path.mkdir()
    record = {
        "format_version": 1,
        "stage": kind,
        "config": config or {},
        "inputs": {f"/elsewhere/{i}": "digest" for i in inputs},
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
        "fingerprint": f"fingerprint of {name}",
    }
    (path / "config.json").write_text(json.dumps(record))
    if arch:
        (path / "arch.json").write_text(arch.dumps())
    if metrics:
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    if result is not None:
        (path / "result.json").write_text(json.dumps(result))
        done = {"stage": kind, "fingerprint": record["fingerprint"], "wall_seconds": 30.0}
        (path / "DONE").write_text(json.dumps(done))
