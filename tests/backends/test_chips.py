"""Facts of chips: every file is whole, and devices find theirs."""

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from nemojax.backends.chips import chip_names, chip_of, load_chip, measured_cpu_peak, peak_flops


@pytest.mark.parametrize("name", chip_names())
def test_every_file_is_whole(name):
    chip = load_chip(name)
    assert chip.name == name and chip.sources and chip.kinds
    assert chip.platform in ("tpu", "gpu")
    assert 1e14 < chip.peak("bfloat16") < 1e16
    assert 15 * 2**30 < chip.hbm_bytes < 200 * 2**30
    # bytes for each FLOP: the balance of today's chips
    assert 1e-3 < chip.hbm_bandwidth / chip.peak("bfloat16") < 1e-2
    assert chip.network_bandwidth < chip.links * chip.link_bandwidth < chip.hbm_bandwidth
    assert bool(chip.torus_dims) == (chip.platform == "tpu") == (not chip.target)


def test_peaks_by_dtype():
    h100 = load_chip("h100")
    assert h100.peak("float8_e4m3fn") == h100.peak("float8") == 1979e12
    assert load_chip("v5p").peak("float8_e4m3fn") == load_chip("v5p").peak("bfloat16")


def test_devices_find_their_chip():
    def found(platform: str, kind: str) -> Any:
        return chip_of(SimpleNamespace(platform=platform, device_kind=kind))

    assert found("tpu", "TPU v5 lite").name == "v5e"
    assert found("gpu", "NVIDIA H200").name == "h200"
    assert found("gpu", "NVIDIA T4") is None
    here: Any = chip_of(jax.devices()[0])
    assert here.name == "cpu"
    assert peak_flops() == measured_cpu_peak() == load_chip("cpu").peak("float32")


def test_an_unknown_chip():
    with pytest.raises(ValueError, match="chip: expected one of .*h100.*, cpu, got 'h300'"):
        load_chip("h300")
