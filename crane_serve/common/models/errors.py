"""The errors for checkpoints and models."""


class CheckpointError(ValueError):
    """MODEL is neither a local checkpoint directory nor an available hub id, or its content cannot be used."""


class UnsupportedModelError(ValueError):
    """A model whose parts are not where they are looked for; the message names the class or module."""
