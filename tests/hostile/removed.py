"""What was removed: its routes must stay away."""

from crane_serve.service.api.score import router
from tests.hostile.case import Case, Outcome


def _batch_routes() -> Outcome:
    paths = sorted({path for route in router.routes if "batch" in (path := getattr(route, "path", ""))})
    return Outcome(f"routes: {', '.join(paths) or 'none'}", not paths)


CASES = {
    "batch-lines": Case(3, "lines to /score/batch beyond the bound of its buffer", "no such route", _batch_routes),
}
