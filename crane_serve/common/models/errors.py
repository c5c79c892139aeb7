"""The error for checkpoints."""


class CheckpointError(ValueError):
    """MODEL is neither a local checkpoint directory nor an available hub id, or its content cannot be used."""
