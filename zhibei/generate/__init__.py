"""Sampling from a model. Knows no training and no server."""
