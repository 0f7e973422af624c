"""Measurements of speed, memory and agreement with rivals; every figure in the docs comes from a file written here."""
