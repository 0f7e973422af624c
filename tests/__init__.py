"""Tests, mirroring the layers of the package."""
