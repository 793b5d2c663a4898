"""A study in a bucket: stopped and gone on with, it comes to what one in a folder does."""

import json

import pytest

from nemojax.buckets import place
from nemojax.compress.bld import Bld
from nemojax.compress.space import Space
from nemojax.config import from_dict
from nemojax.data.mixture import TextData
from nemojax.optim import OptimConfig
from nemojax.rewards.problems import ProblemSet
from nemojax.stage import read_done, read_result
from nemojax.study.run import Config, Extras, Heal, Ledger, run
from tests.buckets.made import TEXTS


@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
def test_the_same_study(bucket, model, tmp_path, monkeypatch):
    cfg = Config(
        parent=str(model.folder),
        data=from_dict(TextData, TEXTS),
        problems=ProblemSet(families=("sum2",), count=4),
        space=Space(attn_noop=False, ffn_ratios=(0.5,), multiple=8),
        bld=Bld(steps=2, optim=OptimConfig(lr=1e-3, weight_decay=0.0)),
        calibration=1,
        ratios=(0.8,),
        heal=Heal(ratio=0.8, ways=("mip",), steps=2),
        extras=Extras(importance=("magnitude",), random_draws=1),
        seeds=(0,),
    )
    made, asked = Ledger.row, []

    def stopping(self, key, make):
        if key["group"] == "healed":
            raise KeyboardInterrupt
        return made(self, key, make)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "row", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(cfg, f"{bucket}/run")
    there = place(f"{bucket}/run")
    kept = json.loads((there / "rows.json").read_text())
    assert len(kept) > 5 and read_done(there) is None
    monkeypatch.setattr(
        Ledger, "row", lambda self, key, make: made(self, key, lambda: (asked.append(key), make())[1])
    )
    result = run(cfg, there)
    assert [key["group"] for key in asked] == ["healed"]
    assert result == run(cfg, tmp_path / "run") == read_result(there)
    for name in ("rows.json", "table.md", "seed0/table.json"):
        assert (there / name).read_text() == (tmp_path / "run" / name).read_text()
    done = read_done(there)
    assert run(cfg, there) == result and read_done(there) == done
