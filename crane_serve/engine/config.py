"""MaskConfig: what the front end tells every engine process about masks, carried inside vLLM's own config."""

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import crane_serve
from crane_serve.checkpoints.resolve import resolve_checkpoint
from crane_serve.masks import Fingerprint, MaskFileError, MaskLibrary

CONFIG_KEY = "crane"
MASKS_VARIABLE = "CRANE_MASKS"
DEFAULT_METHOD_VARIABLE = "CRANE_DEFAULT_METHOD"
DISABLE_VARIABLE = "CRANE_DISABLE"
DEFAULT_METHOD = "attnlrp"


class MaskConfig(dict[str, Any]):
    """Entry of `VllmConfig.additional_config`.

    Its items change the compiled graph and so become part of vLLM's compile-cache key: without them an artefact that
    was compiled without masks could serve a masked request. Its attributes travel along, but new masks need no new
    compilation.
    """

    def __init__(self, rows: int, outputs: bool, model: str, masks: Path, default_method: str, manifest: str) -> None:
        super().__init__(plugin=crane_serve.__version__, rows=rows, outputs=outputs)
        self.model = model
        self.masks = masks
        self.default_method = default_method
        self.manifest = manifest

    @property
    def rows(self) -> int:
        """Rows of the mask table, row 0 (all ones) included."""
        return int(self["rows"])

    @property
    def outputs(self) -> bool:
        """Whether MLP output dimensions can be scaled; the graph multiplies them only if some mask does."""
        return bool(self["outputs"])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rows, self.outputs, self.model, self.masks, self.default_method, self.manifest)


def masks_disabled() -> bool:
    """Whether the kill switch CRANE_DISABLE=1 is set."""
    return os.environ.get(DISABLE_VARIABLE, "") not in ("", "0")


def add_mask_config(vllm_config: Any) -> None:
    """Put a MaskConfig into a new VllmConfig if CRANE_MASKS names a directory of masks.

    Raises MaskFileError when the directory does not exist, FingerprintError when the model cannot be identified.
    """
    directory = os.environ.get(MASKS_VARIABLE)
    if not directory or masks_disabled():
        return
    default_method = os.environ.get(DEFAULT_METHOD_VARIABLE, DEFAULT_METHOD)
    model, masks = str(vllm_config.model_config.model), Path(directory).resolve()
    library = MaskLibrary.load(masks, Fingerprint.of(resolve_checkpoint(model)), default_method)
    # As many rows as requests can run at once, plus row 0: a running request always finds a row.
    rows = int(vllm_config.scheduler_config.max_num_seqs) + 1
    outputs = any(stored.mask.output is not None for stored in library.masks.values())
    config = MaskConfig(rows, outputs, model, masks, default_method, library.manifest)
    vllm_config.additional_config = {**vllm_config.additional_config, CONFIG_KEY: config}


def mask_config(vllm_config: Any) -> MaskConfig | None:
    """The MaskConfig of an engine, or None for an engine that was started without masks."""
    extra = vllm_config.additional_config
    config = extra.get(CONFIG_KEY) if isinstance(extra, Mapping) else None
    if config is not None and not isinstance(config, MaskConfig):
        raise TypeError(f"additional_config[{CONFIG_KEY!r}] is reserved for the crane plugin")
    return config


def mask_library(vllm_config: Any) -> MaskLibrary | None:
    """The masks of an engine, or None for an engine without masks; read once per process.

    Raises MaskFileError if the directory changed since the engine was configured: all processes must agree on it.
    """
    config = mask_config(vllm_config)
    if config is None:
        return None
    return _load(config.model, config.masks, config.default_method, config.manifest)


@lru_cache(maxsize=8)
def _load(model: str, masks: Path, default_method: str, manifest: str) -> MaskLibrary:
    library = MaskLibrary.load(masks, Fingerprint.of(resolve_checkpoint(model)), default_method)
    if library.manifest != manifest:
        raise MaskFileError(f"{masks} changed while the engine was starting; start it again")
    return library
