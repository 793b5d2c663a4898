"""What has to be set before a process starts, for each machine; read without jax."""

from __future__ import annotations

from collections.abc import Mapping

# Of a GPU's memory, for programs; XLA would take three quarters. The rest is the driver's context's, its
# libraries' and the buffers' of collectives.
GPU_MEMORY = 0.92

# Each is read on its own machine alone, so that all can be set anywhere. A TPU needs nothing.
ENVIRONMENT: Mapping[str, str] = {
    # CPU: memory in large pages, of which glibc knows only when a process starts. XLA takes its temporaries
    # anew for every step; in 4 KiB pages the faults cost a sixth of a training step.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": str(GPU_MEMORY),
    # GPU: kernels start in the order in which the scheduler of collectives put them
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}
