"""Programs that serve devices to test guests; each runs in a process of its own."""
