"""Known defects, switched on one at a time. A simulator that does not find them proves nothing."""
