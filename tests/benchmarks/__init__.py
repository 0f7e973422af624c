"""Tests of the measuring code: what it counts, how it keeps results, and that the docs show them."""
