"""Defaults that commands show in their help, and engines use."""

DEFAULT_METHOD = "attnlrp"
"""The method of a mask that is named by its language alone."""

DEFAULT_SERVER = "http://127.0.0.1:8000"
"""Where clients look for a server."""

KEY_VARIABLE = "CRANE_API_KEY"
"""The environment variable whose API key clients send."""

DEFAULT_ROWS = 256
"""How many different masks can be resident."""

MAX_ACTIVATIONS = 4 * 2**20
"""Most values of neurons that one request may ask for: tokens, or reductions, times neurons."""
