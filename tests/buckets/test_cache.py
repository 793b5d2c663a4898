"""A teacher's cache whose work directory is in a bucket, killed or not, and distillation from it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from nemojax import buckets
from nemojax.buckets import place
from nemojax.config import from_dict
from nemojax.distill import distill, teacher_cache
from nemojax.distill.cache_store import TeacherCache, is_input, location
from nemojax.log import read_metrics
from nemojax.stage import OtherRun, read_done, read_result
from tests.buckets.made import TEXTS, wait_until
from tests.environment import QUICK_COMPILATION

STEPS, TOP_K = 6, 4


def values(model, **changes) -> dict:
    return {
        "teacher": str(model.folder),
        "data": TEXTS,
        "steps": STEPS,
        "top_k": TOP_K,
        "steps_per_file": 2,
    } | changes


def config(model, **changes) -> teacher_cache.Config:
    return from_dict(teacher_cache.Config, values(model, **changes))


def rows(workdir) -> dict[str, np.ndarray]:
    cache = TeacherCache(location(str(workdir)))
    assert cache.num_rows == STEPS * TEXTS["batch_size"]
    return {**cache.read(np.arange(cache.num_rows))(), "hash": cache._hashes}


def same(a, b):
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.fixture(scope="module")
def here(model, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("cache") / "run"
    teacher_cache.run(config(model), workdir)
    return workdir


def test_it_holds_the_same(bucket, model, here, tmp_path):
    workdir = f"{bucket}/run"
    result = teacher_cache.run(config(model), workdir)
    assert result == read_result(here) | {"cache": f"{workdir}/rows"} == read_result(workdir)
    assert location(workdir) == location(f"{workdir}/rows") == f"{workdir}/rows"
    same(rows(workdir), rows(here))
    assert [row["step"] for row in read_metrics(workdir)] == [2, 4, 6]
    done = read_done(workdir)
    assert teacher_cache.run(config(model), workdir) == result and read_done(workdir) == done
    with pytest.raises(OtherRun, match="differs in top_k"):
        teacher_cache.run(config(model, top_k=5), workdir)
    assert is_input(workdir) and is_input(str(here))
    assert not is_input(f"{workdir}/rows") and not is_input("memory://rows")
    nothing = f"{bucket}/nothing"
    assert location(nothing) == nothing and location("memory://rows") == "memory://rows"


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_distillation_notices_another_one(bucket, model, here, tmp_path):
    workdir = f"{bucket}/taught"
    teacher_cache.run(config(model), workdir)
    shared = {"student": str(model.folder), "teacher": str(model.folder), "data": TEXTS}
    shared |= {"loss": {"top_k": TOP_K, "cosine": 0.0}, "fit": {"steps": 3, "log_every": 1}}
    online, offline = (
        from_dict(distill.Config, shared | {"teaching": {"cache": cache}}) for cache in (str(here), workdir)
    )
    assert distill.run(offline, f"{bucket}/healed") == distill.run(online, tmp_path / "healed")
    record = json.loads((place(f"{bucket}/healed") / "config.json").read_text())
    assert workdir in record["inputs"]
    buckets.remove_tree(place(workdir))
    teacher_cache.run(config(model, steps=STEPS + 2), workdir)
    with pytest.raises(OtherRun, match=f"differs in input {workdir}"):
        distill.run(offline, f"{bucket}/healed")


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
def test_killed_and_resumed(bucket, model, tmp_path):
    """SIGKILL once a group of steps is there; what is marked as there stays."""
    more = {"steps": 60}
    recipe = tmp_path / "recipe.py"
    recipe.write_text(f"def get_config():\n    return {values(model, **more)!r}\n")
    command = [sys.executable, "-m", "nemojax.cli", "cache", f"--config={recipe}"]
    env = os.environ | {"XLA_FLAGS": QUICK_COMPILATION}
    progress = place(f"{bucket}/killed/progress.json")
    with (tmp_path / "log").open("w") as out:
        first = subprocess.Popen([*command, f"--workdir={bucket}/killed"], env=env, stdout=out, stderr=out)
    wait_until(progress.is_file, first, tmp_path / "log")
    first.kill()
    first.wait()
    assert 0 < TeacherCache(f"{bucket}/killed/rows").num_rows < 480 and read_done(f"{bucket}/killed") is None
    for workdir in (f"{bucket}/killed", str(tmp_path / "whole")):
        done = subprocess.run([*command, f"--workdir={workdir}"], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, other = (TeacherCache(location(at)) for at in (f"{bucket}/killed", str(tmp_path / "whole")))
    assert one.num_rows == 480
    same(one.read(np.arange(480))(), other.read(np.arange(480))())
