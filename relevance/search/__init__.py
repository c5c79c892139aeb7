"""Searches: find neurons by switching them off and measuring the effect."""
