"""Settings of the service: flags, then CRANE_* environment variables, then a file."""

from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from crane_serve.engine.config import DEFAULT_METHOD, DEFAULT_ROWS

_MIB = 2**20


class LogFormat(StrEnum):
    """How log lines are written."""

    TEXT = "text"
    JSON = "json"


class ApiSettings(BaseModel):
    """What protects the service."""

    api_keys_file: Path | None = Field(
        default=None, description="File of API keys: a line 'NAME user|admin KEY' for each"
    )
    user_key: SecretStr | None = Field(default=None, description="An API key of role user; not as a flag")
    admin_key: SecretStr | None = Field(default=None, description="An API key of role admin; not as a flag")
    cors_origins: tuple[str, ...] = Field(default=(), description="Origins whose pages may call this server")
    max_body_bytes: int = Field(default=16 * _MIB, ge=1024, description="Largest body of a request")
    max_batch_buffer_bytes: int = Field(
        default=64 * _MIB, ge=1024, description="Lines of a batch that wait for the engine"
    )
    max_sequences: int = Field(default=2048, ge=1, description="Prompts running or waiting before requests get 429")
    max_requests_per_key: int = Field(default=256, ge=1, description="Requests of one API key at once")
    body_timeout_s: float = Field(
        default=60.0, gt=0, description="Time for a body to arrive; in a batch, for its next piece"
    )
    request_timeout_s: float = Field(default=600.0, gt=0, description="Time for an answer; a batch has no limit")


class ServeSettings(ApiSettings, BaseSettings):
    """What `crane serve` needs to know; everything else is vLLM's own flags."""

    model_config = SettingsConfigDict(env_prefix="CRANE_", extra="forbid")

    model: str = Field(description="Checkpoint directory or hub id")
    masks: Path = Field(description="Directory of mask files")
    default_method: str = Field(default=DEFAULT_METHOD, description="Method that a bare language name means")
    mask_rows: int = Field(default=DEFAULT_ROWS, ge=1, description="How many different masks are resident at most")
    host: str = Field(default="127.0.0.1", description="Address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on")
    header_timeout_s: float = Field(default=10.0, gt=0, description="Time for the head of a request to arrive")
    max_connections: int = Field(default=4096, ge=1, description="Connections at once; more get 503")
    drain_timeout_s: float = Field(default=30.0, ge=0, description="Time for running requests to end after SIGTERM")
    log_format: LogFormat = Field(default=LogFormat.TEXT, description="text or json")
    ssl_certfile: Path | None = Field(default=None, description="Certificate, to serve over TLS")
    ssl_keyfile: Path | None = Field(default=None, description="Key of the certificate")
    engine_flags: tuple[str, ...] = Field(default=(), description="Flags of vLLM")
