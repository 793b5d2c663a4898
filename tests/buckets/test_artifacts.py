"""Artifacts in buckets, and checkpoints of which something is missing."""

import jax
import numpy as np
import pytest

from nemojax import buckets, cli
from nemojax.buckets import place
from nemojax.checkpoints import hf
from nemojax.checkpoints.artifact import Checkpoints, finished_steps, load_model, load_params, save_params
from nemojax.checkpoints.hf import export_hf, import_hf
from nemojax.data.tokenizer import load_tokenizer
from tests.buckets.made import equal


def test_checkpoints(bucket, model):
    checkpoints = Checkpoints(f"{bucket}/checkpoints", keep_last=1, best="loss:min", arch=model.arch)
    state = {"count": np.arange(3)}
    for step, loss in ((1, 1.0), (2, 3.0), (3, 2.0)):
        params = jax.tree.map(lambda w, step=step: w + step, model.params)
        checkpoints.save(step, params, state, {"at": step}, {"loss": loss})
    checkpoints.close()
    again = Checkpoints(f"{bucket}/checkpoints", keep_last=1, best="loss:min", arch=model.arch)
    assert again.steps() == finished_steps(f"{bucket}/checkpoints") == [1, 3] and again.best() == 1
    restored = again.restore_params(3, model.params)
    assert equal(restored, jax.tree.map(lambda w: w + 3, model.params))
    assert again.restore_data(3) == {"at": 3}
    again.close()


def test_a_checkpoint_that_was_cut_short_is_none(bucket, model):
    where = f"{bucket}/short"
    save_params(where, model.arch, model.params, step=1)
    save_params(where, model.arch, model.params, step=2)
    assert finished_steps(where) == [2]  # one is kept
    (place(where) / "checkpoints" / "2" / "commit_success.txt").unlink()
    assert finished_steps(where) == []
    with pytest.raises(ValueError, match=rf"{where}: expected checkpoints/<step>, got none"):
        load_params(where)


def test_an_artifact_there_and_back(bucket, model, tmp_path, capsys):
    """Exported, imported into the bucket, exported from there: the same files."""
    export_hf(model.folder, tmp_path / "hf")
    import_hf(tmp_path / "hf", f"{bucket}/imported")
    arch, params = load_model(f"{bucket}/imported")
    assert arch == model.arch and equal(params, model.params)
    assert load_tokenizer(f"{bucket}/imported").encode("sort up") == load_tokenizer(model.folder).encode(
        "sort up"
    )
    assert cli.main(["export", f"{bucket}/imported", str(tmp_path / "again")]) == 0
    names = buckets.names_in(tmp_path / "hf")
    assert {"config.json", "tokenizer.json"} < names == buckets.names_in(tmp_path / "again")
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    assert cli.main(["import", str(tmp_path / "hf"), f"{bucket}/imported"]) == 2
    assert f"{bucket}/imported: already exists; remove it" in capsys.readouterr().err
    assert cli.main(["export", f"{bucket}/imported", f"{bucket}/hf", "--max_shard_bytes=9000"]) == 0
    export_hf(model.folder, tmp_path / "shards", max_shard_bytes=9000)
    there = {file.name: file.read_bytes() for file in buckets.files_below(place(f"{bucket}/hf"))}
    assert there == {file.name: file.read_bytes() for file in (tmp_path / "shards").iterdir()}
    assert sum(name.endswith(".safetensors") for name in there) > 2
    assert cli.main(["export", f"{bucket}/imported", f"{bucket}/hf"]) == 2
    assert f"{bucket}/hf: already exists; remove it or choose" in capsys.readouterr().err

    assert cli.main(["import", f"{bucket}/hf", str(tmp_path / "back")]) == 0
    assert load_model(tmp_path / "back")[0] == model.arch
    assert equal(load_model(tmp_path / "back")[1], model.params)
    assert cli.main(["export", f"{bucket}/imported", f"{bucket}/fp8", "--dtype=fp8"]) == 0
    export_hf(f"{bucket}/imported", tmp_path / "fp8", dtype="fp8")
    for name, source in (("there", f"{bucket}/fp8"), ("here", tmp_path / "fp8")):
        import_hf(source, tmp_path / name)
    assert equal(load_model(tmp_path / "there")[1], load_model(tmp_path / "here")[1])


def test_a_damaged_checkpoint(bucket, model, tmp_path):
    export_hf(model.folder, tmp_path / "hf")
    file = "model-00001-of-00001.safetensors"
    whole = (tmp_path / "hf" / file).read_bytes()
    for number, (data, message) in enumerate(
        (
            (whole[:-10], f"{file}: corrupt safetensors file .*bytes announced"),
            (b"\xff" * 64, f"{file}: corrupt safetensors file .*a header of"),
            (whole.replace(b"model.norm.weight", b"model.nxrm.weight"), "model.norm.weight"),
        )
    ):
        there = place(f"{bucket}/damaged{number}")
        for name in buckets.names_in(tmp_path / "hf"):
            (there / name).write_bytes(data if name == file else (tmp_path / "hf" / name).read_bytes())
        with pytest.raises(ValueError, match=message):
            import_hf(str(there), tmp_path / "none")
    with pytest.raises(ValueError, match=f"{bucket}/nothing: expected a model directory or a hub name"):
        import_hf(f"{bucket}/nothing", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_a_killed_process_leaves_is_replaced(bucket, model, tmp_path, monkeypatch):
    """Killed before the checkpoint is begun, and when it is whole: nobody else's files go."""

    class Killed(BaseException):
        pass

    close = Checkpoints.close

    def killed(checkpoints, *_):
        close(checkpoints)
        raise Killed

    export_hf(model.folder, tmp_path / "hf")
    where = place(f"{bucket}/killed")
    for name in ("save", "close"):
        with monkeypatch.context() as patch:
            patch.setattr(hf, "_remove", lambda path: None)  # a killed process removes nothing
            patch.setattr(Checkpoints, name, killed)
            with pytest.raises(Killed):
                import_hf(tmp_path / "hf", where)
        assert {buckets.UNFINISHED, "arch.json"} <= buckets.names_in(where)
    import_hf(tmp_path / "hf", where)
    assert buckets.UNFINISHED not in buckets.names_in(where)
    assert equal(load_model(where)[1], model.params)
    (place(f"{bucket}/mine") / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=f"^{bucket}/mine: already exists"):
        import_hf(tmp_path / "hf", f"{bucket}/mine")
    assert buckets.names_in(place(f"{bucket}/mine")) == {"thesis.txt"}
