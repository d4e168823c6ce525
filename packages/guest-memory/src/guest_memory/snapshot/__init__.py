"""Snapshots: an immutable table of regions, how to find things in it, and how to reach them.

Nothing is mapped or unmapped here, and nothing here changes once it is made.
"""
