"""Scores with intervals. Knows no training."""
