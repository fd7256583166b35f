"""How tinygrad compiles kernels here: changes to its own compilers, and finished programs that are kept."""
