"""HTTP in, tokens out: the real server in its own process."""
