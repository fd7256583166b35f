"""The catalogue, and how models' files come to this host."""
