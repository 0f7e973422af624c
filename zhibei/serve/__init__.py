"""Talking to a model. Knows no training."""
