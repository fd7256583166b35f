"""Clusters of real peers, Serf and etcd, each host in its own network namespace, with real faults."""
