"""The engine in Python, the readable statement of the specification."""
