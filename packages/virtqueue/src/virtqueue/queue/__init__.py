"""The two ends of a ring that callers use, and what a take returns.

The rules of a ring format belong in an engine.
"""
