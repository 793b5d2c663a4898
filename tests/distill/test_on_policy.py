"""Learning on own samples: which rows they are, that a resumed run draws the same, and that it all trains."""

import json

import jax
import numpy as np
import pytest

from nemojax.checkpoints.artifact import load_params
from nemojax.config import from_dict
from nemojax.data.mixture import TextData, train_batches
from nemojax.data.tokenizer import load_tokenizer
from nemojax.distill.losses import DistillWeights
from nemojax.distill.on_policy import OnPolicy, OnPolicyBatches
from nemojax.distill.teachers import Teaching, find_teachers
from nemojax.model.llama import Compute
from nemojax.optim import OptimConfig
from nemojax.rewards.problems import ProblemSet
from nemojax.train import FitConfig, fit
from tests.distill.conftest import LENGTH
from tests.distill.test_run import log

OWN = OnPolicy(share=1.0, prompt_tokens=6, max_new_tokens=8)


@pytest.fixture(scope="module")
def made(folder, data):
    """What makes batches out of a configuration, and a loader of the texts."""
    tokenizer, (arch, params) = load_tokenizer(folder / "child"), load_params(folder / "child")

    def loader():
        return train_batches(from_dict(TextData, data), tokenizer)

    def make(cfg: OnPolicy, length: int = LENGTH) -> OnPolicyBatches:
        batches = OnPolicyBatches(loader(), cfg, arch, tokenizer, batch_size=8, length=length)
        batches.bind(lambda: params)
        return batches

    return make, loader


def equal(one: dict, other: dict) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


def test_prompts_are_beginnings_of_the_texts(made):
    make, loader = made
    batches, texts = make(OWN), next(loader())
    batch = next(batches)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in texts.items()
    }
    assert (batch["segments"].max(axis=1) == LENGTH // 13).all()  # 6 + 8 - 1 positions each
    for row in range(8):
        for number in (1, 2):
            here = batch["segments"][row] == number
            prompt = batch["tokens"][row][here][:6]
            window = texts["tokens"][row][13 * (number - 1) : 13 * number]
            assert any(np.array_equal(prompt, window[i : i + 6]) for i in range(len(window) - 5))
            # trained on from the first token that the student wrote
            assert not batch["weights"][row][here][:5].any() and batch["weights"][row][here][5:].all()
    assert (batches.rows == -1).all() and batches.metrics["train/on_policy"] == 1.0
    assert 1 <= batches.metrics["train/mean_gen_tokens_per_sample"] <= 8


def test_a_share_of_the_steps_is_the_students_and_a_resumed_run_draws_the_same(made):
    make, loader = made
    cfg = OnPolicy(share=0.5, prompt_tokens=6, max_new_tokens=8)
    batches, texts = make(cfg), loader()
    seen, own = [], []
    for _ in range(6):
        seen.append(next(batches))
        own.append((batches.rows == -1).all())
        expected = next(texts)
        assert own[-1] != equal(seen[-1], expected)  # a step of its own uses up the texts it begins from
    assert 0 < sum(own) < 6 and batches.metrics["train/on_policy"] == sum(own) / 6
    first = make(cfg)
    for _ in range(3):
        next(first)
    second = make(cfg)
    second.restore(json.loads(json.dumps(first.state())))
    assert all(equal(next(second), seen[step]) for step in (3, 4, 5))
    assert second.state() == batches.state()


def test_prompts_are_questions_or_chats(folder, made, tmp_path):
    make, _ = made
    problems = ProblemSet(count=3, split="train")
    asked = OnPolicy(share=1.0, prompts="problems", problems=problems, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"within data\.length = 9, got \d+ \+ 4; raise data\.length"):
        make(asked, length=9)
    rows = [
        {"messages": [{"role": "user", "content": "one and two"}, {"role": "assistant", "content": "three"}]},
        {"messages": [{"role": "user", "content": "red or blue"}], "thinking": False},
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = OnPolicy(share=1.0, prompts="chats", chats=str(tmp_path / "chats.jsonl"), max_new_tokens=4)
    batches = make(chats, length=64)
    batch = next(batches)
    assert batches.state()["drawn"] == 8 * batch["segments"].max()
    prompts = (batch["segments"] == 1) & (batch["weights"] == 0)
    tokenizer = load_tokenizer(folder / "child")
    texts = {tokenizer.decode(row[here]) for row, here in zip(batch["tokens"], prompts, strict=True)}
    assert len(texts) == 2 and not any("three" in text for text in texts)
    assert any("one and two" in text for text in texts) and any("red or blue" in text for text in texts)


def test_bad_input(made, tmp_path):
    make, _ = made
    with pytest.raises(ValueError, match=r"within data.length = 32, got 30 \+ 8; raise data.length"):
        make(OnPolicy(share=1.0, prompt_tokens=30, max_new_tokens=8))
    for values, message in (
        ({"share": 1.5}, "share: expected 0 to 1, got 1.5"),
        ({"temperature": 0.0}, "temperature: expected a positive number"),
        ({"max_new_tokens": 0}, "expected at least 1"),
        ({"prompts": "chats"}, "chats: expected a file if and only if"),
        ({"chats": "some.jsonl"}, "chats: expected a file if and only if"),
    ):
        with pytest.raises(ValueError, match=message):
            from_dict(OnPolicy, values)


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights(folder, made, tmp_path):
    make, _ = made
    arch, _ = load_params(folder / "child")
    teachers = find_teachers([str(folder / "parent")], Teaching(), arch, load_tokenizer(folder / "child"))
    frozen = teachers.load(None)
    loss_fn = teachers.loss(arch, DistillWeights(), Compute())
    cfg = OnPolicy(share=0.6, prompt_tokens=6, max_new_tokens=8)

    def train(workdir, steps: int):
        params = load_params(folder / "child")[1]
        optim, fit_cfg = OptimConfig(lr=1e-3, schedule="constant"), FitConfig(steps=steps, log_every=1)
        return fit(
            params, loss_fn, make(cfg), arch=arch, optim=optim, cfg=fit_cfg, workdir=workdir, frozen=frozen
        )

    train(tmp_path / "parts", 3)
    parts, whole = train(tmp_path / "parts", 6), train(tmp_path / "whole", 6)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), parts, whole))
    assert log(tmp_path / "parts", "train/loss") == log(tmp_path / "whole", "train/loss")
