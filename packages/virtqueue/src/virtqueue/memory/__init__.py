"""Guest memory as a queue sees it: addresses, copies, barriers and the SIGBUS guard.

Nothing here may know of chains or of a ring's format.
"""
