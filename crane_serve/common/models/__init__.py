"""Model checkpoints: where they come from and which model they are."""
