"""Programs of others, what they print, and systemd."""
