"""The stores: SQLite for one peer, etcd and its members for a cluster, and the ways from one to another."""
