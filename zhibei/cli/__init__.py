"""What the user types: one short function per verb. Knows everything below."""
