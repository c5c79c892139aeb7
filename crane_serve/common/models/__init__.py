"""Model checkpoints: finding, loading and describing them."""
