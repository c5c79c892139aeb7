"""Client half: ask a crane server and turn its answers into the matrix mask x language -> degradation."""

from clients.client import AsyncCraneClient, CraneClient, CraneError

__all__ = ["AsyncCraneClient", "CraneClient", "CraneError"]
