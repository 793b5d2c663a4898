"""The stage that writes a teacher's cache: what is in it, who may use it, what training from it gives."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from nemojax.checkpoints.artifact import load_model, load_params
from nemojax.config import from_dict
from nemojax.data.mixture import TextData, train_batches
from nemojax.data.tokenizer import load_tokenizer, train_tokenizer
from nemojax.distill import distill, teacher_cache
from nemojax.distill.cache_store import TeacherCache, row_hashes
from nemojax.distill.teachers import check_cache
from nemojax.model import llama
from nemojax.sharding import make_mesh, place_batch, use_mesh
from tests.distill.test_run import config, log
from tests.environment import QUICK_COMPILATION

STEPS, TOP_K = 6, 8


def cache_config(folder, data, **values) -> teacher_cache.Config:
    wanted = {"teacher": str(folder / "parent"), "data": data, "steps": STEPS, "top_k": TOP_K}
    return from_dict(teacher_cache.Config, wanted | {"steps_per_file": 4} | values)


@pytest.fixture(scope="module")
def written(folder, data, tmp_path_factory) -> Path:
    """The work directory of the stage: 6 steps of 8 rows, in groups of 4 and 2, on eight devices."""
    workdir = tmp_path_factory.mktemp("cache") / "run"
    result = teacher_cache.run(cache_config(folder, data), workdir)
    assert result == {"cache": str(workdir / "rows"), "rows": 48, "tokens": 48 * 32, "top_k": 8}
    return workdir


def offline(folder, data, written, **values) -> distill.Config:
    return config(
        folder,
        data,
        **{
            "teaching": {"cache": str(written)},
            "loss": {"top_k": TOP_K, "cosine": 0.0},
            "fit": {"steps": STEPS, "log_every": 1},
            "mesh": {"data": 8, "fsdp": 1},
        }
        | values,
    )


def test_it_holds_what_the_teacher_says_of_every_row(folder, data, written):
    cache = TeacherCache(str(written / "rows"))
    mesh = make_mesh()
    arch, params = load_model(folder / "parent", mesh)
    apply = jax.jit(lambda params, batch: jax.nn.log_softmax(llama.apply(params, arch, batch)[0]))
    loader = train_batches(from_dict(TextData, data), load_tokenizer(folder / "parent"))
    for _ in range(STEPS):
        batch = next(loader)
        cache.check(loader.rows, row_hashes(batch))
        told = cache.read(loader.rows)()
        with use_mesh(mesh):
            wanted = np.asarray(apply(params, place_batch(batch, mesh)))
        order = np.argsort(-wanted, axis=-1, kind="stable")
        likeliest, others = np.split(np.take_along_axis(wanted, order, -1), [TOP_K], axis=-1)
        np.testing.assert_allclose(told["logps"], likeliest, atol=2e-5)
        np.testing.assert_allclose(np.take_along_axis(wanted, told["ids"], -1), likeliest, atol=2e-5)
        np.testing.assert_allclose(np.exp(told["tail"]), np.exp(others).sum(-1), atol=1e-5)
    assert cache.num_rows == 48
    assert [row["step"] for row in map(json.loads, (written / "metrics.jsonl").open())] == [4, 6]


def test_training_from_it_is_online_training(folder, data, written, tmp_path):
    losses = []
    for name, teaching in (("online", {}), ("offline", {"cache": str(written)})):
        cfg = offline(folder, data, written, teaching=teaching)
        result = distill.run(cfg, tmp_path / name)
        losses.append(
            log(tmp_path / name, "train/loss") + [result["heldout"]["loss"], result["heldout_kl"]["loss"]]
        )
    assert len(losses[0]) == STEPS + 2
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    online, healed = (jax.tree.leaves(load_params(tmp_path / n)[1]) for n in ("online", "offline"))
    for a, b in zip(online, healed, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher": "other"}, "got a cache of another teacher; take the teacher that it is of, or write"),
        (
            {"loss": {"top_k": TOP_K, "temperature": 2.0}},
            r"loss\.temperature 2, got a cache at 1; set",
        ),
        ({"loss": {"top_k": 9}}, "expected loss.top_k from 1 to the 8 tokens that it keeps, got 9"),
        ({"fit": {"steps": 7}}, r"expected 56 rows, got 48, which are 6 steps of 8; write a longer cache"),
        ({"data": {"seed": 1}}, "use the data configuration of the cache, or write another"),
        (
            {"teaching": {"cache": "nothing"}},
            r"expected a teacher's cache \(cache\.json\), got none",
        ),
    ],
)
def test_who_may_not_use_it(folder, data, written, tmp_path, values, message):
    values = dict(values)
    if "teacher" in values:
        values["teacher"] = str(folder / values["teacher"])
    if "data" in values:
        values["data"] = data | values["data"]
    cfg = offline(folder, values.pop("data", data), written, **values)
    with pytest.raises(ValueError, match=message):
        distill.run(cfg, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_cache_of_another_tokenizer_is_refused_and_a_moved_teacher_is_not(folder, data, written, tmp_path):
    cache = TeacherCache(str(written / "rows"))
    told = {"data": cache.told.data, "length": 32, "rows": 48, "temperature": 1.0, "mesh": None}
    shutil.copytree(folder / "parent", tmp_path / "moved", copy_function=shutil.copyfile)
    (tmp_path / "moved" / "checkpoints" / "note").write_text("so that the fingerprint of the files differs")
    check_cache(cache, str(tmp_path / "moved"), load_tokenizer(folder / "parent"), **told)
    others = train_tokenizer(["entirely other words were read here"] * 9, 320, tmp_path / "words")
    with pytest.raises(ValueError, match="got a cache of another; take the one that it is of"):
        check_cache(cache, str(folder / "parent"), others, **told)


def test_bad_input(folder, data, tmp_path):
    for values, message in (
        ({"top_k": 320}, "top_k: expected less than the vocabulary of 320, got 320"),
        ({"data": data | {"length": 256}}, r"data\.length: expected at most the context 128, got 256"),
    ):
        cfg = cache_config(folder, values.pop("data", data), **values)
        with pytest.raises(ValueError, match=message):
            teacher_cache.run(cfg, tmp_path / "run")
    with pytest.raises(ValueError, match="steps, top_k, steps_per_file: expected at least 1"):
        cache_config(folder, data, top_k=0)


# --- real processes

WORKER = """
import json, os, signal, sys
from nemojax.config import from_dict
from nemojax.distill import teacher_cache
from nemojax.distill.cache_store import TeacherCache

commit, count = TeacherCache.commit, 0

def fatal(self, step, hashes):
    global count
    count += 1
    if str(count) == os.environ.get("DIES"):  # files of this group are written, but not marked
        os.kill(os.getpid(), int(os.environ.get("OF", signal.SIGKILL)))
    commit(self, step, hashes)

TeacherCache.commit = fatal
teacher_cache.run(from_dict(teacher_cache.Config, json.loads(sys.argv[1])), sys.argv[2])
"""


def start(values: dict, workdir: Path, count: int = 1, **env: str) -> list[int]:
    """Exit codes of the stage in `count` processes of eight devices together."""
    shared = {"XLA_FLAGS": f"{QUICK_COMPILATION} --xla_force_host_platform_device_count={8 // count}"}
    if count > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared["NEMOJAX_COORDINATOR"] = f"127.0.0.1:{free.getsockname()[1]}"
        shared["NEMOJAX_NUM_PROCESSES"] = str(count)
    started = []
    for index in range(count):
        mine = {"NEMOJAX_PROCESS_ID": str(index)} if count > 1 else {}
        command = [sys.executable, "-c", WORKER, json.dumps(values), str(workdir)]
        with open(f"{workdir}.log{index}", "a") as out:
            environment = os.environ | shared | mine | env
            started.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
    return [process.wait(300) for process in started]


def contents(cache: Path) -> dict[str, np.ndarray]:
    store = TeacherCache(str(cache))
    return {**store.read(np.arange(store.num_rows))(), "hash": store._hashes}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "group", "rows"), [("SIGKILL", "2", 16), ("SIGTERM", "1", 32)])
def test_a_signal_costs_one_group_at_most(folder, data, written, tmp_path, name, group, rows):
    values = {"teacher": str(folder / "parent"), "data": data, "steps": STEPS, "top_k": TOP_K}
    values["steps_per_file"] = 2
    number = getattr(signal, name)
    code = 75 if number == signal.SIGTERM else -number
    assert start(values, tmp_path / "run", DIES=group, OF=str(int(number))) == [code]
    store = TeacherCache(str(tmp_path / "run" / "rows"))
    assert store.num_rows == rows and not (tmp_path / "run" / "DONE").exists()
    if name == "SIGKILL":  # where the data stood gets lost as well: then the way there is walked again
        (tmp_path / "run" / "progress.json").unlink()
    first = next(f for f in (tmp_path / "run" / "rows" / "ids" / "c" / "0").rglob("*") if f.is_file())
    before = first.stat().st_mtime_ns
    assert start(values, tmp_path / "run") == [0], (tmp_path / "run.log0").read_text()[-3000:]
    assert first.stat().st_mtime_ns == before  # what was there is not made again
    one, other = contents(tmp_path / "run" / "rows"), contents(written / "rows")
    np.testing.assert_array_equal(one["hash"], other["hash"])
    np.testing.assert_array_equal(one["ids"], other["ids"])
    np.testing.assert_allclose(one["logps"], other["logps"], atol=1e-6)


@pytest.mark.slow
def test_two_processes_write_what_one_does_and_one_goes_on(folder, data, written, tmp_path):
    values = {"teacher": str(folder / "parent"), "data": data, "steps": STEPS, "top_k": TOP_K}
    values["steps_per_file"] = 2
    assert start(values, tmp_path / "two", 2) == [0, 0], (tmp_path / "two.log1").read_text()[-3000:]
    codes = start(values, tmp_path / "both", 2, DIES="3")
    assert codes[0] == -signal.SIGKILL and codes[1] != 0
    assert TeacherCache(str(tmp_path / "both" / "rows")).num_rows == 32
    assert start(values, tmp_path / "both") == [0], (tmp_path / "both.log0").read_text()[-3000:]
    other = contents(written / "rows")
    for name in ("two", "both"):
        one = contents(tmp_path / name / "rows")
        np.testing.assert_array_equal(one["hash"], other["hash"])
        np.testing.assert_allclose(one["logps"], other["logps"], atol=1e-5)
