"""Rehearsals: what an outage would do to an owner's own hosts, models and load."""
