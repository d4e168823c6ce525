"""The ring engine in Python: what the formats share, and one file for each.

A process that the C engine serves must not import it.
"""
