"""Numbers: the bootstrap and LangSpec-F1."""
