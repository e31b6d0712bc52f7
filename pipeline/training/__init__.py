"""Training on Ray Train, resumable at every checkpoint."""
