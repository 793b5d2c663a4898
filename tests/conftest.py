"""Every test runs on eight virtual CPU devices, and with warnings about our own code as errors."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
)
os.environ["NEMOJAX_COMPILATION_CACHE"] = "off"  # the user's own stays as it is
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks the network is a wrong test
os.environ["TOKENIZERS_PARALLELISM"] = "false"
