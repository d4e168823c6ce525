"""Regions: what a front-end describes, and the memory of this process behind it.

Mapping and unmapping live here, and who holds which addresses. What a snapshot of several regions
means, and access to it, do not.
"""
