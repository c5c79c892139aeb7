"""The server process: settings -> application -> uvicorn."""

import sys
from pathlib import Path

import uvicorn

from crane_serve.api.app import create_app
from crane_serve.checkpoints.resolve import resolve_checkpoint
from crane_serve.engine.service import EngineService, configure_engine
from crane_serve.settings import ServeSettings


def serve(settings: ServeSettings) -> None:
    """Serve until a signal ends the process.

    Raises ValueError (CheckpointError, MaskFileError, UnsupportedEngine, ...) before anything starts.
    """
    model = resolve_checkpoint(settings.model)
    name = model.name if Path(settings.model).is_dir() else settings.model
    config = configure_engine(model, settings.masks, settings.default_method, settings.mask_rows, settings.engine_flags)
    app = create_app(lambda: EngineService.start(config, name))
    uvicorn.run(app, host=settings.host, port=settings.port, timeout_graceful_shutdown=30)


if __name__ == "__main__":
    from crane_serve.cli import app

    app(["serve", *sys.argv[1:]])
