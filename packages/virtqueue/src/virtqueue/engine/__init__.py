"""Engines, which walk one ring each behind `interface`, and their in-flight records.

Nothing here may know of batches as objects or of device code.
"""
