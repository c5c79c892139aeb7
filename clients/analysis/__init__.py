"""Analysis: from the answers of a run to its statistics. Everything shares one paired bootstrap over items."""

from clients.analysis.findings import MATCHED_EFFECTS, Findings, analyse

__all__ = ["MATCHED_EFFECTS", "Findings", "analyse"]
