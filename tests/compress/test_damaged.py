"""Files of a compression that were cut short are named, not traced back."""

import json

import numpy as np
import pytest

from nemojax.arch import Linear
from nemojax.compress import importance
from nemojax.compress.bld import Weights
from nemojax.compress.variants import Library
from tests.compress.tiny import ARCH


def test_a_truncated_importance_file_is_named(tmp_path):
    path = tmp_path / "importance.npz"
    np.savez(path, ones=np.ones(8))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"importance\.npz: damaged .*delete it and run again"):
        importance.load(path)


@pytest.fixture
def library(tmp_path) -> Library:
    made = Library(tmp_path)
    made.claim("a parent", ARCH)
    for layer in range(2):
        weights: Weights = {"ffn": {"linear": np.full((32, 32), layer + 1, np.float32)}}
        made.save("ffn", Linear(), layer, weights, np.ones(2, np.float32), {"recipe": {}})
    return made


def test_a_whole_library_is_taken_as_it_is(library):
    again = Library(library.dir)
    again.claim("a parent", ARCH)
    assert again.layers("ffn-linear") == (0, 1) and again.load("ffn", Linear(), 1)["linear"][3, 3] == 2
    with pytest.raises(ValueError, match=r"ffn-linear: layer 2: no such variant; build the library"):
        again.load("ffn", Linear(), 2)


@pytest.mark.parametrize("harm", ["turned", "cut", "gone"])
def test_damaged_weights_are_named(library, harm):
    """A bit that turned round, too: every array has a checksum."""
    files = [p for p in (library.dir / "ffn-linear" / "d").iterdir() if p.stat().st_size > 4096]
    for path in files:
        data = bytearray(path.read_bytes())
        data[1000] ^= 1
        if harm == "turned":
            path.write_bytes(data)
        elif harm == "cut":
            path.write_bytes(data[:500])
        else:
            path.unlink()
    with pytest.raises(ValueError, match=r"ffn-linear: damaged or unreadable .*delete the folder and run ag"):
        Library(library.dir).load("ffn", Linear(), 0)


def test_a_damaged_list_of_variants_is_named(library):
    path = library.dir / "ffn-linear" / "manifest.ocdbt"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"ffn-linear: damaged or unreadable .*delete the folder and run ag"):
        Library(library.dir).layers("ffn-linear")


def test_a_damaged_or_foreign_library_is_named(library):
    path = library.dir / "library.json"
    about = json.loads(path.read_text())
    with pytest.raises(ValueError, match=r"library.json: expected a library of this parent \(another\), got"):
        library.claim("another", ARCH)
    path.write_text(json.dumps({**about, "format_version": 9}))
    with pytest.raises(ValueError, match=r"library.json: expected format_version 1, got 9; use the nemojax"):
        library.claim("a parent", ARCH)
    path.write_text(path.read_text()[:20])
    with pytest.raises(ValueError, match=r"library.json: expected JSON"):
        library.claim("a parent", ARCH)
    path.unlink()
    with pytest.raises(ValueError, match=r"library.json: expected the parent's fingerprint, got none beside"):
        library.claim("a parent", ARCH)
