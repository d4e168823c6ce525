"""Regions: a front-end's descriptions of memory, and their mappings in this process.

Mapping and unmapping belong here, and so does the ownership of address ranges. The meaning of a
snapshot of several regions, and access to it, belong to `snapshot`.
"""
