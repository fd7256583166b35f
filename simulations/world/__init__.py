"""Whole peers in a simulated world: trio under a virtual clock, and models behind every port."""
