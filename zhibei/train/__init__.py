"""The loops, one visible file per method. Knows no other stage."""
