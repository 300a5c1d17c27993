"""Placement of exact layers: scores of sets of layers, and the searches that ask for them."""
