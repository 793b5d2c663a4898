"""Files of a compression that were cut short are named, not traced back."""

import numpy as np
import pytest

from nemojax.compress import importance


def test_a_truncated_importance_file_is_named(tmp_path):
    path = tmp_path / "importance.npz"
    np.savez(path, ones=np.ones(8))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"importance\.npz: damaged .*delete it and run again"):
        importance.load(path)
