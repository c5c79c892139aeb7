"""Searches: neurons found by trying what switching them off does."""
