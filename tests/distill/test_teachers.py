"""Teachers: of the student's vocabulary or of a part of it, in a dtype and places of their own."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from nemojax.checkpoints.artifact import load_model, load_params, save_params
from nemojax.checkpoints.digest import weights_digest
from nemojax.data.tokenizer import load_tokenizer, train_tokenizer
from nemojax.data.vocabulary import shared_vocab, tokenizer_digest
from nemojax.distill.losses import STAND_IN, DistillWeights, TokenTerms
from nemojax.distill.measure import Heldout
from nemojax.distill.teachers import Teaching, find_teachers
from nemojax.model import llama
from nemojax.model.llama import Compute, init_params
from nemojax.optim import OptimConfig, make_optimizer
from nemojax.sharding import MeshConfig, make_mesh, place_batch, use_mesh
from nemojax.train import init_state, make_step

KL = DistillWeights(cosine=0.0, tokens=TokenTerms(shared=320))


@pytest.fixture(scope="module")
def grown(folder, tmp_path_factory):
    """A teacher whose tokenizer has two more added tokens, after the first 320 ids."""
    path = tmp_path_factory.mktemp("grown")
    rust = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    rust.add_tokens([tokenizers.AddedToken("<one>"), tokenizers.AddedToken("<two>")])
    shutil.copytree(folder / "tokenizer", path / "tokenizer")
    rust.save(str(path / "tokenizer" / "tokenizer.json"))
    arch = load_params(folder / "parent")[0].replace(vocab_size=322)
    save_params(path, arch, init_params(arch, jax.random.key(5)))
    return path


def rows(vocab: int, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (8, 17)).astype(np.int32)
    ones = np.ones((8, 16), np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": ones,
        "positions": np.cumsum(ones, 1, dtype=np.int32) - 1,
        "weights": ones.astype(np.float32),
    }


def test_a_tokenizer_is_what_it_does_not_how_it_is_written(folder, grown, tmp_path):
    mine = load_tokenizer(folder / "tokenizer")
    shutil.copytree(mine.path, tmp_path / "other")
    text = json.loads((mine.path / "tokenizer.json").read_text())
    text["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in text["model"]["merges"]]
    text["post_processor"] = None
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(text))
    other = load_tokenizer(tmp_path / "other")
    assert tokenizer_digest(other) == tokenizer_digest(mine) != tokenizer_digest(load_tokenizer(grown))
    assert shared_vocab(mine, other) == 320 == shared_vocab(mine, load_tokenizer(grown))
    others = train_tokenizer(["entirely other words were read here"] * 9, 320, tmp_path / "words")
    assert shared_vocab(mine, others) == 0


def test_teachers_of_another_vocabulary_are_refused(folder, grown, tmp_path):
    arch, tokenizer = load_params(folder / "child")[0], load_tokenizer(folder / "child")
    there = r"the same for 320 ids \(then <one> there, nothing here\); set loss\.tokens\.shared to 320"
    for shared in (0, 321):
        with pytest.raises(ValueError, match=there):
            find_teachers([str(grown)], Teaching(), arch, tokenizer, shared)
    shutil.copytree(folder / "parent", tmp_path / "words")
    train_tokenizer(["entirely other words were read here"] * 9, 320, tmp_path / "words" / "tokenizer")
    with pytest.raises(ValueError, match="got one that cuts texts in another way; take a teacher"):
        find_teachers([str(tmp_path / "words")], Teaching(), arch, tokenizer, 300)
    shutil.copytree(grown, tmp_path / "padded")
    shutil.copytree(folder / "tokenizer", tmp_path / "padded" / "tokenizer", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"got one of 322 that is the same for 320 ids"):
        find_teachers([str(tmp_path / "padded")], Teaching(), arch, tokenizer)
    (tmp_path / "padded" / "arch.json").unlink()
    with pytest.raises(ValueError, match=r"expected an artifact with arch\.json, got none"):
        find_teachers([str(tmp_path / "padded")], Teaching(), arch, tokenizer)


def test_the_shared_part_of_two_vocabularies_is_compared(folder, grown):
    """The student has one token more than it shares, and reads it; its teacher reads another there."""
    arch = load_params(folder / "child")[0].replace(vocab_size=321)
    student = init_params(arch, jax.random.key(6))
    teachers = find_teachers([str(grown)], Teaching(), arch, load_tokenizer(folder / "child"), 320)
    frozen, data = teachers.load(None), rows(320)
    data["tokens"][2, 5] = data["targets"][2, 4] = 320
    shown = {**data, "tokens": np.where(data["tokens"] == 320, STAND_IN, data["tokens"])}
    s = jax.nn.log_softmax(llama.apply(student, arch, data)[0][..., :320])
    t = jax.nn.log_softmax(llama.apply(frozen, teachers.archs[0], shown)[0][..., :320])
    kl = jnp.sum(jnp.exp(t) * (t - s), axis=-1).at[2, 5].set(0.0)
    loss, _, metrics = teachers.loss(arch, KL, Compute())(student, frozen, data, jax.random.key(0))
    np.testing.assert_allclose(loss, jnp.sum(kl), rtol=1e-4)
    measured = Heldout(teachers, arch, {"rows": [data]})
    assert measured.kl(student, frozen)["rows"] == pytest.approx(float(loss) / (8 * 16 - 1), rel=1e-4)
    assert metrics["kl"][1] == 8 * 16 - 1
    logps = jnp.take_along_axis(
        jax.nn.log_softmax(llama.apply(frozen, teachers.archs[0], shown)[0]), data["targets"][..., None], -1
    )[..., 0]
    known = (data["tokens"] < 320) & (data["targets"] < 320)
    expected = -float(jnp.sum(logps * known)) / known.sum()
    assert measured.teacher(frozen)["rows"] == pytest.approx(expected, rel=1e-4)


def test_teachers_keep_their_dtype_and_places_and_no_gradient(folder):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    arch, params = load_model(folder / "child", mesh)
    cfg = Teaching(dtype="bfloat16", split="tensor")
    teachers = find_teachers([str(folder / "parent")], cfg, arch, load_tokenizer(folder / "child"))
    frozen = teachers.load(mesh)
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype(jnp.bfloat16)}
    axes = {axis for leaf in jax.tree.leaves(frozen) for axis in leaf.sharding.spec}
    assert axes == {None, "tensor"}
    assert "fsdp" in {axis for leaf in jax.tree.leaves(params) for axis in leaf.sharding.spec}
    places = jax.tree.map(lambda leaf: leaf.sharding, frozen)
    with use_mesh(mesh):
        tx = make_optimizer(OptimConfig(schedule="constant"), 10)
        state = init_state(params, tx, jax.random.key(0))
        like = jax.tree.map(lambda leaf: leaf.sharding, state)
        loss_fn = teachers.loss(arch, DistillWeights(), Compute())
        step = jax.jit(make_step(loss_fn, tx), out_shardings=(like, None))
        compiled = step.lower(state, frozen, place_batch(rows(320), mesh)).compile()
        state, metrics = compiled(state, frozen, place_batch(rows(320), mesh))
    assert np.isfinite(float(metrics["loss"]))
    assert jax.tree.map(lambda leaf: leaf.sharding, frozen) == places  # neither donated nor moved
    # what a step gives back is the student's state: nothing of the teacher's size beside it
    per_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    memory = compiled.memory_analysis()
    assert memory is not None and memory.output_size_in_bytes < per_device + 1024
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}


def test_a_digest_of_weights_knows_every_bit_and_no_mesh(folder):
    arch, params = load_params(folder / "parent")
    digest = weights_digest(arch, params)
    assert digest == weights_digest(*load_model(folder / "parent", make_mesh()))
    changed = jax.tree.map(lambda w: w, params)
    changed["norm"]["scale"] = params["norm"]["scale"].at[3].multiply(1 + 1e-7)
    swapped = {**params, "embed": {"weight": params["embed"]["weight"][::-1]}}
    assert len({digest, weights_digest(arch, changed), weights_digest(arch, swapped)}) == 3
