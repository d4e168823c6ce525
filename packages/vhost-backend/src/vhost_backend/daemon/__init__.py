"""Programs that serve: the daemon on threads, the one in a loop, and what reports of them.

Connections, waiting and the end of a process belong here. The effect of a message belongs to
`control`.
"""
