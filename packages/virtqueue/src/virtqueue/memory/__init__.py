"""Guest memory as a ring needs it: tables, checked copies, barriers, where a ring lies.

Nothing here knows descriptors' meaning; what every user of guest memory needs is guest_memory's.
"""
