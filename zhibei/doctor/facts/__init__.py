"""What is known about a run before it starts: frozen plain values, one file per subject."""
