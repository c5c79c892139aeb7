"""Texts: corpora, the files they come from, and the languages they are in."""
