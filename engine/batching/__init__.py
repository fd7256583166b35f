"""Which token of which run is computed next, and what is drawn from its logits. Knows nothing of devices."""
