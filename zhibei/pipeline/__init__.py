"""Several stages in sequence. Knows every stage."""
