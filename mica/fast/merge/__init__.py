"""Merging adapters into the weights, and unmerging to the original bits."""
