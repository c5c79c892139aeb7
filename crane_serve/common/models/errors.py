"""What is raised for a checkpoint."""


class CheckpointError(ValueError):
    """MODEL is neither a local checkpoint directory nor a hub id that can be had, or what it holds cannot be used."""
