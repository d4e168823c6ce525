"""Programs that serve: the daemon on threads, the one in a loop, and what reports of them.

Here are connections, waiting and the end of a process. What a message does belongs to `control`.
"""
