"""What lies on disk: run directories, checkpoints, manifests, metrics. Knows no training and no rows."""
