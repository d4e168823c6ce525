"""Guest memory as a ring needs it: tables, checked copies, barriers, where a ring lies.

Nothing here knows what a descriptor means.  Code that every user of guest memory needs belongs in
guest_memory.
"""
