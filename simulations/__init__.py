"""Deterministic failure simulations: thousands of bad days per run, each replayed by its seed."""
