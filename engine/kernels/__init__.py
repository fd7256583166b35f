"""What devices compute, and the forms of weights that they read. `cpu_*` and `vectors` are for CPUs only."""
