"""The lowest layer: every other package may use it, and it uses none of them."""
