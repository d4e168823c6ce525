"""A disk on a file or block device."""
