"""What takes and completes chains: one interface, the engines behind it, in-flight records.

An engine knows one ring's block and memory; it knows no device and no batch object.
"""
