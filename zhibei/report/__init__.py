"""One self-contained page per run, drawn from what the run wrote. Knows no training."""
