"""What processes under test are started with."""

# Tests compile far more than they compute, and LLVM's optimiser is most of a compilation on a CPU. XLA's own
# passes run as ever; users' processes have both.
QUICK_COMPILATION = "--xla_backend_optimization_level=0"
# compiler options of the few programs that compute for long, or are held to the last bits
OPTIMISED = {"xla_backend_optimization_level": 3}
