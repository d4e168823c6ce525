"""What Linux offers and Python does not: system calls with raw addresses, nothing about guests."""
