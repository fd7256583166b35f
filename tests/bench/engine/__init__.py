"""Measures of the engine beside llama.cpp and tinygrad's own server: `make bench-engine`."""
