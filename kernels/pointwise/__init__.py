"""Ops on rows of activations: norms, activations, quantising a row."""
