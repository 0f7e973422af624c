"""What could go wrong, found before it costs a run, and the proof that it will not."""
