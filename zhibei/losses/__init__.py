"""Arithmetic on tensors that returns sums. Knows torch and nothing else."""
