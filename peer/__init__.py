"""The bitinglip peer: one trio process on each GPU host."""
