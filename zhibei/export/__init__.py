"""Models handed on: merged, written for other programs, and proved to be what was trained."""
