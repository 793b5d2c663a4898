"""Every test runs on eight virtual CPU devices, and with warnings about our own code as errors."""

import gc
import os
from collections import Counter
from pathlib import Path

import pytest

from tests.environment import QUICK_COMPILATION

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    (os.environ.get("XLA_FLAGS", ""), QUICK_COMPILATION, "--xla_force_host_platform_device_count=8")
).strip()
os.environ["NEMOJAX_COMPILATION_CACHE"] = "off"  # the user's own stays as it is
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks the network is a wrong test
os.environ["TOKENIZERS_PARALLELISM"] = "false"

MAPS = Path("/proc/self/maps")
MANY_MAPS = 20_000  # of the 65,530 that Linux gives a process; a few thousand are added by one large file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests begin first, so that no worker is left alone with one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs take several memory maps each; a process that has no more of them crashes."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()
