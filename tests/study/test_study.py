"""A study of a tiny parent: what measures children, the stage from end to end, and going on after a stop."""

from __future__ import annotations

import json

import jax
import pytest

from nemojax.arch import uniform
from nemojax.checkpoints.artifact import save_params
from nemojax.compress.bld import Bld
from nemojax.compress.measures import answer_batches
from nemojax.compress.space import Space
from nemojax.data.mixture import TextData, heldout_batches
from nemojax.data.problems import lines, make_problems
from nemojax.data.sources import Source, load_texts
from nemojax.data.tokenizer import load_tokenizer, train_tokenizer
from nemojax.evaluate.perplexity import heldout_loss
from nemojax.generate.completions import generate
from nemojax.generate.sampling import SamplingConfig
from nemojax.model.llama import init_params
from nemojax.optim import OptimConfig
from nemojax.rewards.problems import ProblemSet
from nemojax.study.exam import Exam
from nemojax.study.run import Config, Extras, Heal, Ledger, run
from nemojax.train import lm_loss

PROBLEMS = ProblemSet(families=("sum2",), count=6)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    source = Source(name="sum2", kind="problems", field="trace", limit=200)
    train_tokenizer(load_texts(source), 300, root / "tokenizer")
    tokenizer = load_tokenizer(root / "tokenizer")
    arch = uniform(
        vocab_size=tokenizer.vocab_size,
        dim=16,
        num_layers=4,
        num_heads=2,
        num_kv_heads=2,
        ffn_width=32,
        context=64,
        head_dim=8,
    )
    params = init_params(arch, jax.random.key(0))
    save_params(root / "parent", arch, params, tokenizer_dir=root / "tokenizer")
    data = TextData(sources=(source,), length=48, batch_size=4, heldout_batches=2)
    return root, arch, params, tokenizer, data


def test_the_parent_is_its_own_equal(world):
    _, arch, params, tokenizer, data = world
    exam = Exam(params, arch, tokenizer, data, PROBLEMS)
    row = exam(params, arch)
    whole = heldout_loss(params, arch, heldout_batches(data, tokenizer))
    assert row["kl"] == pytest.approx(0.0, abs=1e-6) and row["params"] == arch.num_block_params()
    assert row["loss"] == pytest.approx(whole["loss"], abs=1e-5)


def test_problems_are_right_exactly_where_greedy_decoding_is(world):
    """A model trained on half of the problems gets those right, by one forward pass and by asking."""
    _, arch, params, tokenizer, data = world
    problems = make_problems("sum2", 6, 0, "heldout")
    [batch] = answer_batches(problems[:3], tokenizer, batch_size=3, length=48, form="trace")
    learnt = {name: jax.numpy.asarray(value) for name, value in batch.items()}
    loss_fn = lm_loss(arch)

    def loss(p):
        total, weight, _ = loss_fn(p, None, learnt, jax.random.key(0))
        return total / weight

    @jax.jit
    def step(p):
        return jax.tree.map(lambda w, g: w - 0.5 * g, p, jax.grad(loss)(p))

    for _ in range(300):
        params = step(params)
    accuracy = Exam(params, arch, tokenizer, data, PROBLEMS)(params, arch)["accuracy"]
    right = 0
    for problem in problems:
        [text] = lines(problem, "trace")
        prompt = [tokenizer.bos_id, *tokenizer.encode(problem.prompt)]
        wanted = [*tokenizer.encode(text), tokenizer.eos_id][len(prompt) - 1 :]
        sampling = SamplingConfig(temperature=0.0, max_new_tokens=len(wanted))
        [done] = generate(params, arch, [prompt], jax.random.key(0), sampling)
        right += list(done.tokens) == wanted
    assert accuracy == pytest.approx(right / 6) and right >= 3


def test_a_row_is_measured_once(tmp_path):
    ledger = Ledger(tmp_path / "rows.json")
    asked = []
    for _ in range(2):
        row = ledger.row({"group": "g", "name": "a"}, lambda: asked.append(1) or {"kl": 0.5})
    assert row["kl"] == 0.5 and len(asked) == 1
    assert Ledger(tmp_path / "rows.json").rows == ledger.rows


@pytest.mark.slow
def test_a_whole_study_stops_and_goes_on(world, tmp_path, monkeypatch):
    root, _, _, _, data = world
    cfg = Config(
        parent=str(root / "parent"),
        data=data,
        problems=PROBLEMS,
        space=Space(kv_heads=(1,), ffn_ratios=(0.5,), multiple=8),
        bld=Bld(steps=3, optim=OptimConfig(lr=1e-3, weight_decay=0.0)),
        calibration=1,
        ratios=(0.7, 0.5),
        heal=Heal(ratio=0.5, ways=("mip", "mip first weights"), steps=2),
        extras=Extras(importance=("magnitude", "activation"), fused="1-3", random_draws=2),
        seeds=(0, 1),
    )
    made = Ledger.row

    def stopping(self, key, make):
        if key["name"] == "greedy" and key["seed"] == 1:
            raise KeyboardInterrupt
        return made(self, key, make)

    monkeypatch.setattr(Ledger, "row", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(cfg, tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "rows.json").read_text())
    monkeypatch.setattr(Ledger, "row", made)
    result = run(cfg, tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "rows.json").read_text())
    assert rows[: len(kept)] == kept and len(rows) > len(kept)
    mip = [row for row in rows if row["name"] == "mip" and row["group"] == "search"]
    assert len(mip) == 4 and all(row["params"] <= row["ratio"] * result["parent"]["params"] for row in mip)
    assert {c["holds"][-2:] for c in result["claims"]} == {"/2"}
    assert {row["name"] for row in rows if row["group"] == "fusion"} >= {"fused", "unfused, healed on"}
    assert "Claims" in (tmp_path / "run" / "table.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heal": Heal(ways=("mip", "best"))}, r"heal.ways: expected some of mip, .*, got 'best'"),
        ({"extras": Extras(importance=("luck",))}, r"extras.importance: expected some of .*, got 'luck'"),
        ({"seeds": ()}, "seeds: expected at least one, got none"),
        ({"extras": Extras(fused="0,1,3")}, r"extras.fused: expected 3 neighbouring layers .*, got '0,1,3'"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_trained(world, tmp_path, change, message):
    root, _, _, _, data = world
    with pytest.raises(ValueError, match=message):
        run(Config(parent=str(root / "parent"), data=data, **change), tmp_path / "run")
    assert not list((tmp_path / "run").glob("seed*"))
