"""FP8 checkpoints in the form of compressed-tensors, which vLLM and Transformers read: written, and read.

`NAME.weight` in e4m3 stands for its values times `NAME.weight_scale`; activations are rounded per token when
the model runs. Block matrices are kept so, embedding, norms and head in bf16. The scale we write is a power
of two, as in `backends.fp8`: it is exact in any dtype, and a loader that fuses q, k and v under the largest
of their scales shifts exponents and rounds nothing but what is near zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from nemojax.backends.fp8 import E4M3
from nemojax.checkpoints.hf_weights import SafetensorsDir, Weight, numpy_dtype

Dtype = Literal["stored", "bf16", "fp8"]
DTYPES: tuple[Dtype, ...] = ("stored", "bf16", "fp8")
QUANTIZATION_CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "float",
                "strategy": "tensor",
                "symmetric": True,
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
            "output_activations": None,
        }
    },
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
}
_SCALE = "_scale"  # of "x.weight": "x.weight_scale"
_OTHER_SCALES = (".input_scale", ".k_scale", ".v_scale")  # of activations and caches: measured as they come


def as_written(weight: Weight, array: np.ndarray, dtype: Dtype) -> dict[str, np.ndarray]:
    """The tensors that say `array`, in torch's layout, in a checkpoint of that dtype."""
    if dtype == "stored":
        return {weight.name: array}
    if dtype == "bf16" or not _is_matrix(weight):
        return {weight.name: array.astype(jnp.bfloat16)}
    absmax = np.abs(array).max().astype(np.float32)
    if not np.isfinite(absmax):
        raise ValueError(f"{weight.name}: expected finite weights for fp8, got {absmax}; export another step")
    mantissa, exponent = np.frexp(absmax / np.float32(jnp.finfo(E4M3).max))
    exponent -= mantissa == 0.5  # the least power of two that is enough
    values = np.ldexp(array.astype(np.float32), -exponent).astype(E4M3)
    return {weight.name: values, weight.name + _SCALE: np.ldexp(np.float32(1), [exponent])}


def written_size(weight: Weight, stored: np.dtype, dtype: Dtype) -> int:
    """Bytes of the tensor itself in a checkpoint of that dtype."""
    itemsize = {"stored": stored.itemsize, "bf16": 2, "fp8": 1 if _is_matrix(weight) else 2}[dtype]
    return int(np.prod(weight.shape, dtype=np.int64)) * itemsize


def is_fp8(config: Mapping[str, Any], where: str) -> bool:
    """Whether a config.json announces FP8 weights that can be read; ValueError for other quantised ones."""
    if not (quantization := config.get("quantization_config")):
        return False
    groups = list((quantization.get("config_groups") or {}).values())
    weights = [group.get("weights") or {} for group in groups]
    readable = quantization.get("quant_method") == "compressed-tensors" and all(
        w.get("type") == "float" and w.get("num_bits") == 8 and w.get("strategy") in ("tensor", "channel")
        for w in weights
    )
    if not weights or not readable:
        method = quantization.get("quant_method", quantization)
        raise ValueError(
            f"{where}: quantization_config: expected none, or compressed-tensors of 8-bit floats with a "
            f"scale per tensor or channel, got {method!r}; import the unquantised checkpoint"
        )
    return True


class Dequantized(SafetensorsDir):
    """A directory whose FP8 tensors read as numbers of the dtype that its embedding has."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        self._layouts: dict[str, tuple[int, dict[str, Any]]] = {}
        kept = [name for name, (_, dtype) in self.headers.items() if dtype == "F8_E4M3"]
        if missing := [name for name in kept if name + _SCALE not in self.headers]:
            raise ValueError(
                f"{directory}: expected {missing[0]}{_SCALE} beside FP8 weights, got none; download it again"
            )
        self._scales = {name: self._scale(name) for name in kept}
        _, self._dtype = self.headers.get("model.embed_tokens.weight", ((), "BF16"))
        for name in list(self.files):
            if name.removesuffix(_SCALE) in self._scales and name.endswith(_SCALE):
                del self.files[name], self.headers[name]
            elif name.endswith(_OTHER_SCALES):
                del self.files[name], self.headers[name]
        self.headers |= {name: (self.headers[name][0], self._dtype) for name in kept}

    def read(self, name: str) -> np.ndarray:
        if name not in self._scales:
            return super().read(name)
        values = self._read_e4m3(name).astype(np.float32)
        return (values * self._scales[name]).astype(numpy_dtype(self._dtype))

    def _scale(self, name: str) -> np.ndarray:
        """One number, or a column of one for every row."""
        scale = super().read(name + _SCALE).astype(np.float32)
        rows = self.headers[name][0][0]
        if scale.size not in (1, rows):
            raise ValueError(
                f"{self.directory}: {name}{_SCALE}: expected 1 or {rows} scales, got {list(scale.shape)}"
            )
        return scale.reshape(-1, 1)

    def _read_e4m3(self, name: str) -> np.ndarray:
        """numpy has no such type of its own, so safetensors does not give it."""
        path = self.directory / self.files[name]
        with path.open("rb") as file:
            if path.name not in self._layouts:
                length = int.from_bytes(file.read(8), "little")
                self._layouts[path.name] = 8 + length, json.loads(file.read(length))
            start, layout = self._layouts[path.name]
            first, last = layout[name]["data_offsets"]
            file.seek(start + first)
            return np.frombuffer(file.read(last - first), E4M3).reshape(layout[name]["shape"])


def _is_matrix(weight: Weight) -> bool:
    return weight.path.startswith("layers/") and len(weight.shape) > 1
