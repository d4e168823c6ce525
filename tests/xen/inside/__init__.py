"""Runs in the dom0 of the machine: each check prints one result line."""
