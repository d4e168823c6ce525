"""Which message is legal when, what answers it, and the protocol without I/O."""
