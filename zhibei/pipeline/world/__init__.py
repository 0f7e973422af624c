"""A small world with checkable answers: what `zhibei quickstart` learns. Knows no model and no training."""
