"""Rows: read, clean, mix, prepare, batch. Knows text and files, no models."""
