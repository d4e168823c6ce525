"""Queues as their two sides use them: a device's with its batches, a driver's.

A queue drives an engine; how a ring is laid out belongs there.  `device` and `driver` are the two
ends; each other file holds one subject of the device's.
"""
