"""The server process: settings -> application -> its life."""

from pathlib import Path

from crane_serve.common.masks import mask_directory
from crane_serve.common.models.resolve import resolve_checkpoint
from crane_serve.engine.configure import configure_engine
from crane_serve.engine.service import EngineService
from crane_serve.service.api.app import create_app
from crane_serve.service.exposure import require_keys
from crane_serve.service.lifecycle import run
from crane_serve.service.logs import configure_logging
from crane_serve.service.settings import ServeSettings


def serve(settings: ServeSettings) -> int:
    """Serve until a signal or the death of the engine; the exit code.

    Raises ValueError (CheckpointError, MaskFileError, HubMasksError, UnsupportedEngine, ...) before anything starts.
    """
    require_keys(settings)
    model = resolve_checkpoint(settings.model, settings.revision)
    name = model.name if Path(settings.model).is_dir() else settings.model
    config = configure_engine(
        model,
        mask_directory(settings.masks),
        settings.default_method,
        settings.mask_rows,
        settings.engine_flags,
        inline_masks=settings.inline_masks,
        activations=settings.activations,
        gates=settings.gates,
    )
    configure_logging(settings.log_format, settings.log_level)
    app = create_app(lambda: EngineService.start(config, name), settings)
    return run(app, settings)
