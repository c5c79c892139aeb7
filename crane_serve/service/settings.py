"""Settings of the service: flags, then CRANE_* environment variables, then a file, then defaults."""

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    JsonConfigSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
    YamlConfigSettingsSource,
)

from crane_serve.common.defaults import DEFAULT_METHOD, DEFAULT_ROWS
from crane_serve.common.hub_name import HUB_NAME, HubName, is_on_hub

ENVIRONMENT_PREFIX = "CRANE_"
CONFIG_VARIABLE = "CRANE_CONFIG"
SECRETS = frozenset({"user_key", "admin_key"})
"""Settings that are never flags, since command lines are visible to others, and never shown."""

_MIB = 2**20
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_FILES: dict[str, Callable[[type[BaseSettings], Path], PydanticBaseSettingsSource]] = {
    ".toml": TomlConfigSettingsSource,
    ".yaml": YamlConfigSettingsSource,
    ".yml": YamlConfigSettingsSource,
    ".json": JsonConfigSettingsSource,
}


class LogFormat(StrEnum):
    """How log lines are written."""

    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    """The least severe log lines that are written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class SettingSource(StrEnum):
    """Where a setting comes from; the first that has it wins."""

    FLAG = "flag"
    ENVIRONMENT = "environment"
    FILE = "file"


class SettingError(ValueError):
    """A setting that is missing, unknown or out of range; `source` is None for one that is missing."""

    def __init__(self, message: str, setting: str, source: SettingSource | None) -> None:
        super().__init__(message)
        self.setting, self.source = setting, source


def _at_commas(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _as_in_a_shell(value: object) -> object:
    return shlex.split(value) if isinstance(value, str) else value


class ApiSettings(BaseModel):
    """What protects the service."""

    model_config = ConfigDict(allow_inf_nan=False)

    api_keys_file: Path | None = Field(
        default=None, description="File of API keys: a line 'NAME user|admin KEY' for each"
    )
    user_key: SecretStr | None = Field(default=None, description="An API key of role user; not as a flag")
    admin_key: SecretStr | None = Field(default=None, description="An API key of role admin; not as a flag")
    cors_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_at_commas)] = Field(
        default=(), description="Origins whose pages may call this server, joined with commas"
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_at_commas)] = Field(
        default=(),
        description="Names that the server has besides localhost and its address, joined with commas; requests for "
        "others are refused. * is any, the default with keys",
    )
    max_body_bytes: int = Field(default=16 * _MIB, ge=1024, description="Largest body: an uploaded mask")
    max_json_bytes: int = Field(default=4 * _MIB, ge=1024, description="Largest body of any other request")
    max_buffered_bytes: int = Field(
        default=512 * _MIB, ge=1024, description="Bodies of all requests together", validate_default=True
    )
    max_sequences: int = Field(default=2048, ge=1, description="Prompts, each times n, running or waiting at once")
    max_sequences_per_key: int | None = Field(
        default=None, ge=1, description="The same for one API key; by default half of max_sequences"
    )
    max_requests_per_key: int = Field(default=256, ge=1, description="Requests of one API key at once")
    body_timeout_s: float = Field(default=60.0, gt=0, description="Time for a body to arrive")
    request_timeout_s: float = Field(default=600.0, gt=0, description="Time for an answer")

    playground: bool = Field(default=True, description="Whether the page at / is served")
    evaluation: Path | None = Field(default=None, description="An evaluation (by `crane eval`) for that page to show")

    @property
    def has_keys(self) -> bool:
        """Whether requests need a key."""
        return any(key is not None for key in (self.api_keys_file, self.user_key, self.admin_key))

    @field_validator("max_buffered_bytes")
    @classmethod
    def _holds_the_largest_body(cls, most: int, info: ValidationInfo) -> int:
        largest = info.data.get("max_body_bytes", 0)
        if most < largest:
            raise ValueError(f"expected at least the {largest} of max_body_bytes")
        return most


class ServeSettings(ApiSettings, BaseSettings):
    """What `crane serve` needs to know; everything else is vLLM's own flags."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, extra="forbid")

    model: str = Field(description="Checkpoint directory or hub id")
    revision: str | None = Field(default=None, description="Commit, branch or tag of the hub id")
    masks: str = Field(description=f"Directory of mask files, or {HUB_NAME} on the Hugging Face Hub")
    default_method: str = Field(default=DEFAULT_METHOD, description="Method that a bare language name means")
    mask_rows: int = Field(default=DEFAULT_ROWS, ge=1, description="How many different masks are resident at most")
    inline_masks: bool = Field(default=False, description="Whether requests may bring masks of neurons in their bodies")
    activations: bool = Field(default=False, description="Whether requests can ask for the values of neurons")
    gates: bool = Field(default=False, description="Whether they can ask for these, and for act(gate) and up")
    host: str = Field(default="127.0.0.1", description="Address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on")
    insecure: bool = Field(default=False, description="Whether others may reach the server though it has no keys")
    max_connections: int = Field(default=4096, ge=1, description="Connections at once; more get 503")
    drain_timeout_s: float = Field(default=30.0, ge=0, description="Time for running requests to end after SIGTERM")
    log_format: LogFormat = Field(default=LogFormat.TEXT, description="How log lines are written")
    log_level: LogLevel = Field(default=LogLevel.INFO, description="The least severe log lines that are written")
    ssl_certfile: Path | None = Field(default=None, description="Certificate, to serve over TLS")
    ssl_keyfile: Path | None = Field(default=None, description="Key of the certificate")
    engine_flags: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_as_in_a_shell)] = Field(
        default=(),
        description="Flags of vLLM; any on the command line replace all flags from the environment or a file",
    )

    @field_validator("masks")
    @classmethod
    def _can_hold_masks(cls, masks: str) -> str:
        if is_on_hub(masks):
            return str(HubName.parse(masks))
        if not Path(masks).is_dir():
            raise ValueError(f"directory '{masks}' does not exist")
        return masks

    @field_validator("ssl_keyfile")
    @classmethod
    def _has_a_certificate(cls, key: Path | None, info: ValidationInfo) -> Path | None:
        if key is not None and info.data.get("ssl_certfile") is None:
            raise ValueError("expected ssl_certfile, too")
        return key

    @model_validator(mode="after")
    def _knows_its_names(self) -> Self:
        if self.allowed_hosts or not self.has_keys:
            self.allowed_hosts = tuple(dict.fromkeys((*_LOOPBACK, self.host, *self.allowed_hosts)))
        return self


@dataclass(frozen=True)
class LoadedSettings:
    """Settings, and where each that is not at its default comes from."""

    settings: ServeSettings
    sources: Mapping[str, SettingSource]


def load_settings(flags: Mapping[str, Any], file: Path | None = None) -> LoadedSettings:
    """The effective settings.

    file: TOML, YAML or JSON by its suffix; None for the one that CRANE_CONFIG names, if it does. Raises ValueError for
    a file that cannot be read, SettingError for the first setting that is wrong.
    """
    file = file or (Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None)
    of_file = None if file is None else _read(file)

    class Settings(ServeSettings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (init_settings, env_settings, *([] if of_file is None else [of_file]))

    sources: dict[str, SettingSource] = dict.fromkeys(of_file() if of_file is not None else (), SettingSource.FILE)
    sources |= dict.fromkeys(EnvSettingsSource(ServeSettings)(), SettingSource.ENVIRONMENT)
    sources |= dict.fromkeys(flags, SettingSource.FLAG)
    try:
        settings = Settings(**flags)
    except ValidationError as error:
        raise _explain(error, sources, file) from None
    return LoadedSettings(settings, sources)


def _read(file: Path) -> PydanticBaseSettingsSource:
    kind = _FILES.get(file.suffix.lower())
    if kind is None:
        raise ValueError(f"configuration {file}: expected a name that ends in {', '.join(_FILES)}")
    if not file.is_file():
        raise ValueError(f"configuration {file} does not exist")
    try:
        return kind(ServeSettings, file)
    except Exception as error:  # each format has errors of its own; YAML's error quotes the line, which may hold a key
        mark = getattr(error, "problem_mark", None)
        problem = str(error) if mark is None else f"{getattr(error, 'problem', '')}, line {mark.line + 1}"
        raise ValueError(f"configuration {file}: not a readable mapping: {problem}") from None


def _explain(error: ValidationError, sources: Mapping[str, SettingSource], file: Path | None) -> SettingError:
    problems = error.errors(include_url=False)
    name = str(problems[0]["loc"][0])
    source = sources.get(name)
    unknown = [str(problem["loc"][0]) for problem in problems if problem["type"] == "extra_forbidden"]
    if unknown:
        return SettingError(
            f"configuration {file}: unknown settings: {', '.join(unknown)}", unknown[0], SettingSource.FILE
        )
    variable = f"{ENVIRONMENT_PREFIX}{name.upper()}"
    if problems[0]["type"] == "missing":
        return SettingError(f"{name} is not given, neither as a flag nor as {variable} nor in a file", name, None)
    message = problems[0]["msg"].removeprefix("Value error, ")
    actual = "" if name in SECRETS else f", found {str(problems[0]['input'])!r}"
    places = {SettingSource.FLAG: "a flag", SettingSource.ENVIRONMENT: variable, SettingSource.FILE: str(file)}
    place = "its default" if source is None else places[source]
    return SettingError(f"{name}: {message}{actual} (from {place})", name, source)
