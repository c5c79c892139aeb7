"""Settings of the service, from flags or CRANE_* environment variables."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from crane_serve.engine.config import DEFAULT_METHOD, DEFAULT_ROWS


class ServeSettings(BaseSettings):
    """What `crane serve` needs to know; everything else is vLLM's own flags."""

    model_config = SettingsConfigDict(env_prefix="CRANE_", extra="forbid")

    model: str = Field(description="Checkpoint directory or hub id")
    masks: Path = Field(description="Directory of mask files")
    default_method: str = Field(DEFAULT_METHOD, description="Method that a bare language name means")
    mask_rows: int = Field(DEFAULT_ROWS, ge=1, description="How many different masks are resident at most")
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    engine_flags: tuple[str, ...] = ()
