"""Who runs next, and the wire: scheduler, engine process, REST, the `hybrid` command. Never imports torch or numba."""
