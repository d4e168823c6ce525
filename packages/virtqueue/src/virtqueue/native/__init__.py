"""Work that C does for a whole batch: handlers, serving, transfers.

A queue must work without this room.
"""
