"""Benchmarks of a cluster: three hosts in network namespaces with real peers, Serf and etcd, on this one machine.

`make bench-cluster`, or `.venv/bin/python -m tests.bench.cluster`: see `__main__`. Nothing here asserts a timing.
"""
