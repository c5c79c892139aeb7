"""Defaults that commands show in their help, and engines use."""

DEFAULT_METHOD = "attnlrp"
"""The method of a mask that is named by its language alone."""

DEFAULT_ROWS = 256
"""How many different masks can be resident."""
