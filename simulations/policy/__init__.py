"""The policy level: the pure decisions of `peer.decide` under a heap of virtual events, without trio or threads."""
