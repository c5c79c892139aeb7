"""Offline half: run a Hugging Face model over text and find the neurons each language needs."""
