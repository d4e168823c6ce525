"""Work on a queue that stays in C: handlers, a worker's whole turn, files and io_uring.

Nothing here is needed where the C library is missing.
"""
