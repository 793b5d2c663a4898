"""Bad input at the command line, in real processes: one line, exit code 2, nothing lost or half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from nemojax.arch import uniform
from nemojax.checkpoints.artifact import load_params
from nemojax.checkpoints.hf import import_hf
from nemojax.checkpoints.hf_config import config_from_arch
from nemojax.checkpoints.hf_weights import INDEX, weights_of
from nemojax.data.tokenizer import train_tokenizer
from tests.environment import QUICK_COMPILATION

CONTEXT, VOCABULARY = 36, 280
SHARD = "model-00002-of-00002.safetensors"
COMMAND = [sys.executable, "-m", "nemojax.cli"]
ENVIRONMENT = os.environ | {"XLA_FLAGS": QUICK_COMPILATION}  # one device, as users have


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    """`hf`, a sharded Llama with its tokenizer; `artifact`, the same imported; `large`, a tokenizer."""
    from safetensors.numpy import save_file

    root = tmp_path_factory.mktemp("toys")
    train_tokenizer(["some text to learn bytes from " * 20], VOCABULARY, root / "hf")
    train_tokenizer(["some text to learn bytes from " * 20], VOCABULARY + 1, root / "large")
    arch = uniform(
        vocab_size=VOCABULARY,
        dim=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        ffn_width=64,
        context=CONTEXT,
    )
    rng = np.random.default_rng(0)
    weights = weights_of(arch)
    tensors = {w.name: rng.normal(0, 0.2, w.hf_shape).astype(np.float32) for w in weights}
    names = list(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:7], SHARD: names[7:]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, root / "hf" / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (root / "hf" / INDEX).write_text(json.dumps(index))
    config = config_from_arch(arch, "llama", None, "float32", {})
    (root / "hf" / "config.json").write_text(json.dumps(config))
    import_hf(root / "hf", root / "artifact")
    return root


def nemojax(*args: object) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, args)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def refusal(done: subprocess.CompletedProcess[str], *parts: str) -> str:
    """The one line of a refused command, with `parts` in it; a stage's progress lines stand apart."""
    lines = [line for line in done.stderr.splitlines() if not re.match(r"\w+ \d+/\d+  ", line)]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and lines[0].startswith("nemojax: "), done.stderr
    for part in parts:
        assert part in lines[0], lines[0]
    return lines[0]


def contents(directory: Path) -> dict[str, bytes | None]:
    """Everything below a directory, files with their bytes."""
    found = sorted(directory.rglob("*"))
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None for p in found}


def nothing_made(workdir: Path) -> bool:
    """A stage that refused has at most left its own configuration and lock, which do not bind a next run."""
    return not workdir.exists() or set(os.listdir(workdir)) <= {"config.json", ".lock"}


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(path: Path) -> str:
    return f"[{{'name': 'mine', 'kind': 'jsonl', 'path': {str(path)!r}}}]"


# Import: the damage done to a good directory, and what the line must say.


def without_a_shard(hf: Path) -> None:
    (hf / SHARD).unlink()


def with_a_truncated_shard(hf: Path) -> None:
    os.truncate(hf / SHARD, (hf / SHARD).stat().st_size // 2)


def with_a_truncated_index(hf: Path) -> None:
    os.truncate(hf / INDEX, 100)


def of_another_architecture(hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(
        json.dumps(config | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]})
    )


def with_a_larger_tokenizer(hf: Path) -> None:
    shutil.copyfile(hf.parent.parent / "large" / "tokenizer.json", hf / "tokenizer.json")


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (without_a_shard, [f"{SHARD}: no such file", "download"]),
        (with_a_truncated_shard, [f"{SHARD}: corrupt safetensors", "download it again"]),
        (with_a_truncated_index, [f"{INDEX}: truncated or damaged index", "download it again"]),
        (of_another_architecture, ["config.json", "mistral is not supported", "supported are llama"]),
        (with_a_larger_tokenizer, ["tokenizer.json", "has id 280, expected ids below vocab_size 280"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_import(toys, tmp_path, damage: Callable[[Path], None], parts):
    shutil.copytree(toys / "hf", tmp_path / "models" / "hf")
    (tmp_path / "large").symlink_to(toys / "large")
    damage(tmp_path / "models" / "hf")
    before = contents(tmp_path)
    refusal(nemojax("import", tmp_path / "models" / "hf", tmp_path / "artifact"), *parts)
    assert contents(tmp_path) == before


def test_an_unknown_command(tmp_path):
    refusal(nemojax("distil", f"--workdir={tmp_path / 'w'}"), "'distil'", "did you mean 'distill'?")
    assert not contents(tmp_path)


def test_an_unknown_key(tmp_path):
    done = nemojax("pretrain", f"--workdir={tmp_path / 'w'}", "--config.optim.warmup_step=3")
    refusal(done, "optim.warmup_step: unknown key; did you mean 'warmup_steps'?")
    assert not contents(tmp_path)


def test_a_malformed_line(tmp_path):
    """Its file and number; blank lines count as lines and are skipped, and their number is said."""
    data, workdir = jsonl(tmp_path / "data.jsonl", {"text": "some words"}), tmp_path / "run"
    with data.open("a") as file:
        file.write('\n  \n{"text": "cut o\n')
    args = ["tokenizer", f"--workdir={workdir}", f"--config.sources={texts(data)}", "--config.vocab_size=280"]
    refusal(nemojax(*args), f"{data}:4: expected one JSON object a line", "repair the line")
    assert nothing_made(workdir)
    data.write_text(data.read_text().replace("cut o", 'cut off"}'))
    done = nemojax(*args)
    assert done.returncode == 0 and "data.jsonl: skipped 2 blank lines" in done.stderr, done.stderr
    assert json.loads((workdir / "result.json").read_text())["documents"] == 2


def test_a_chat_longer_than_the_context(toys, tmp_path):
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "!"},
    ]
    long = [*chat, {"role": "user", "content": "why?" * 40}, {"role": "assistant", "content": "so"}]
    chats = jsonl(tmp_path / "chats.jsonl", {"messages": chat}, {"messages": long})
    done = nemojax(
        "sft",
        f"--workdir={tmp_path / 'run'}",
        f"--config.model={toys / 'artifact'}",
        f"--config.data.sources=[{{'name': 'mine', 'path': {str(chats)!r}}}]",
        f"--config.data.length={CONTEXT}",
    )
    line = refusal(done, "expected at most", "tokens, got", "shorten it")
    assert re.search(r"chats\.jsonl\D+(1|2): ", line), line  # which one
    assert nothing_made(tmp_path / "run")


def test_a_row_longer_than_the_context(toys, tmp_path):
    args = [f"--workdir={tmp_path / 'run'}", f"--config.model={toys / 'artifact'}"]
    done = nemojax("pretrain", *args, f"--config.data.length={CONTEXT + 1}")
    refusal(done, f"data.length: expected at most the model's context {CONTEXT}, got {CONTEXT + 1}")
    assert nothing_made(tmp_path / "run")


def test_a_prompt_longer_than_the_context(toys, tmp_path):
    done = nemojax("rl", f"--workdir={tmp_path / 'run'}", f"--config.model={toys / 'artifact'}")
    refusal(done, "prompt", f"expected at most {CONTEXT - 1} tokens, got ")
    assert nothing_made(tmp_path / "run")


def test_a_tokenizer_with_more_ids_than_the_vocabulary(toys, tmp_path):
    args = [f"--config.model={toys / 'artifact'}", f"--config.tokenizer={toys / 'large'}"]
    done = nemojax("pretrain", f"--workdir={tmp_path / 'run'}", *args)
    refusal(done, "expected at most 280 ids (the architecture's vocabulary), got 281", "use the checkpoint's")
    assert nothing_made(tmp_path / "run")


@pytest.mark.parametrize(
    ("model", "row", "out", "parts"),
    [
        ("artifact", '{"prompt": "cut o', "out.jsonl", [":2: expected one JSON object a line", "repair"]),
        ("artifact", '{"promt": "words"}', "out.jsonl", [":2: promt: unknown field", "'prompt'"]),
        (
            "artifact",
            '{"messages": [{"role": "user", "content": "why?"}]}',
            "out.jsonl",
            [":2: expected at most 35"],
        ),
        ("artifact", '{"prompt": "words"}', "prompts.jsonl", ["another file than the prompts"]),
        ("hf", '{"prompt": "words"}', "out.jsonl", ["expected checkpoints/<step>, got none"]),
    ],
    ids=["malformed", "unknown-field", "too-long", "same-file", "no-artifact"],
)
def test_a_file_of_prompts(toys, tmp_path, model, row, out, parts):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "words"}\n' + row + "\n")
    before = contents(tmp_path)
    refusal(nemojax("generate", toys / model, f"--prompts={prompts}", f"--out={tmp_path / out}"), *parts)
    assert contents(tmp_path) == before


@pytest.fixture(scope="module")
def finished(toys, tmp_path_factory) -> tuple[list[str], Path]:
    """The arguments of a small stage, and its finished work directory."""
    root = tmp_path_factory.mktemp("finished")
    data = jsonl(root / "data.jsonl", {"text": "some words to learn from"})
    args = ["tokenizer", f"--config.sources={texts(data)}"]
    assert nemojax(*args, "--config.vocab_size=280", f"--workdir={root / 'run'}").returncode == 0
    return args, root / "run"


def test_the_work_directory_of_another_run(finished):
    args, workdir = finished
    before = contents(workdir)
    done = nemojax(*args, "--config.vocab_size=300", f"--workdir={workdir}")
    refusal(done, f"{workdir}: the work directory of another run", "differs in vocab_size", "choose another")
    assert contents(workdir) == before


@pytest.mark.parametrize("lost", ["fingerprint", "inputs", "config", "stage"])
def test_a_configuration_edited_by_hand(finished, tmp_path, lost):
    args, workdir = finished
    shutil.copytree(workdir, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != lost}))
    before = contents(tmp_path)
    refusal(nemojax(*args, "--config.vocab_size=300", f"--workdir={tmp_path / 'run'}"), str(tmp_path / "run"))
    assert contents(tmp_path) == before


def test_an_infeasible_budget(toys, tmp_path):
    """For each bound the nearest value that is possible with the other held."""
    done = nemojax(
        "compress",
        f"--workdir={tmp_path / 'run'}",
        f"--config.parent={toys / 'artifact'}",
        "--config.data.length=32",
        "--config.data.batch_size=2",
        "--config.importance.batches=1",
        "--config.scoring.batches=1",
        "--config.bld.steps=1",
        "--config.space.ffn_ratios=(0.5,)",
        "--config.space.multiple=8",
        "--config.space.ffn_noop=False",
        "--config.cost.timings=()",
        "--config.budget.ratio.params=0.6",
        "--config.budget.minimum.kv_mib=1",
    )
    refusal(
        done,
        "budget: expected bounds that some choice of blocks meets",
        "params max 29088 (least possible with the others held: 30368)",
        "kv_mib min 1 (most possible with the others held: 0.5)",
        "relax one",
    )
    assert nothing_made(tmp_path / "run")  # counted costs are checked before anything is trained


# Slow: training, a second process, and file systems of a few pages.

TRAINING = ["--config.data.length=32", "--config.data.batch_size=2", "--config.data.heldout_batches=1"]


def pretrain(toys: Path, workdir: Path, *args: str) -> list[str]:
    return ["pretrain", f"--workdir={workdir}", f"--config.model={toys / 'artifact'}", *TRAINING, *args]


@pytest.mark.slow
def test_a_second_process_on_the_same_work_directory(toys, tmp_path):
    workdir = tmp_path / "run"
    args = pretrain(toys, workdir, "--config.fit.steps=1000000", "--config.fit.log_every=1000000")
    first = subprocess.Popen([*COMMAND, *args], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        assert first.stderr and first.stderr.readline().startswith("run 1/1000000")
        before = contents(workdir / "checkpoints")
        line = refusal(
            nemojax(*args), f"{workdir}: in use by process {first.pid}", "choose another --workdir"
        )
        assert "wait for it" in line and contents(workdir / "checkpoints") == before
        assert first.poll() is None
    finally:
        first.terminate()
        first.communicate(timeout=120)
    assert first.returncode == 75  # undisturbed: it saved its state and left
    assert any(path.name.isdigit() for path in (workdir / "checkpoints").iterdir())


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of the given size, or makes the mounted one that large."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: str) -> Path:
        again = ["remount"] if os.path.ismount(disk) else []
        options = ",".join([*again, f"size={size}"])
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
        return disk

    yield mount
    if os.path.ismount(disk):
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["import", "export"])
@pytest.mark.parametrize("size", ["4k", "32k", "100k"])
def test_a_full_disk_while_converting(toys, small_disk, command, size):
    source = toys / ("hf" if command == "import" else "artifact")
    before, disk = contents(source), small_disk(size)
    refusal(nemojax(command, source, disk / "out"), f"{disk}/out", "free some")
    assert contents(disk) == {} and contents(source) == before
    small_disk("16m")
    assert nemojax(command, source, disk / "out").returncode == 0


@pytest.mark.slow
def test_a_full_disk_while_training(toys, small_disk):
    """The last whole checkpoint stays, and with more room the run ends as if nothing had happened."""
    disk = small_disk("2m")
    fit = ["--config.fit.steps=4", "--config.fit.checkpoint_every=1", "--config.fit.keep_last=9"]
    refusal(
        nemojax(*pretrain(toys, disk / "run", *fit)),
        "no space left while saving step",
        "free some and run again",
    )
    assert not (disk / "run" / "DONE").exists()
    steps = [int(p.name) for p in (disk / "run" / "checkpoints").iterdir() if p.name.isdigit()]
    assert steps and max(steps) < 4
    load_params(disk / "run")
    small_disk("16m")
    done = nemojax(*pretrain(toys, disk / "run", *fit))
    assert done.returncode == 0 and (disk / "run" / "DONE").exists(), done.stderr


@pytest.mark.slow
def test_a_full_disk_while_generating(toys, small_disk, tmp_path):
    """With more room the output goes on to what it is where there was always enough."""
    prompts = jsonl(tmp_path / "prompts.jsonl", *({"prompt": f"{i} words"} for i in range(60)))
    disk = small_disk("20k")

    def generate(out: Path) -> subprocess.CompletedProcess[str]:
        return nemojax(
            "generate", toys / "artifact", f"--prompts={prompts}", f"--out={out}", "--config.chunk=8", "--n=2"
        )

    refusal(generate(disk / "out.jsonl"), "disk full", f"{disk}/out.jsonl", "free some space and run again")
    size = (disk / "out.jsonl").stat().st_size
    small_disk("16m")
    done = generate(disk / "out.jsonl")
    assert done.returncode == 0 and "rows_before=0" not in done.stdout, done.stdout
    assert generate(tmp_path / "whole.jsonl").returncode == 0
    assert (disk / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert 0 < size < (tmp_path / "whole.jsonl").stat().st_size
