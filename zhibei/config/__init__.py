"""What was asked for: the run file, its reader, and the errors people see. Knows no stage and no torch."""
