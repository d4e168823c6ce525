"""Snapshots: an immutable table of regions, address look-ups in it, and access to the memory.

Nothing here maps or unmaps memory, and a snapshot never changes.
"""
