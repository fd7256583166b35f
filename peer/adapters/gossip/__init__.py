"""Serf: its agent, and what it says of who is there."""
