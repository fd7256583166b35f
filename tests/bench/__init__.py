"""Benchmarks of the product beside what people use today, on the same machine in the same run.

`make bench`, or `.venv/bin/python -m tests.bench`: see `__main__`. Nothing here asserts a timing.
"""
