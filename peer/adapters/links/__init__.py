"""Links between peers, and who is trusted: TLS, certificates, how hosts join."""
