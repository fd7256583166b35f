"""A model's files as they are read: whatever is in them, they give what is right or an error."""
