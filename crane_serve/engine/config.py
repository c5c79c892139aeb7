"""MaskConfig: what the front end tells every engine process about masks, carried inside vLLM's own config."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import crane_serve
from crane_serve.common.defaults import DEFAULT_METHOD, DEFAULT_ROWS
from crane_serve.common.masks import Fingerprint, MaskFileError, MaskLibrary, mask_directory
from crane_serve.common.models.resolve import resolve_checkpoint
from crane_serve.engine.weights import require_own_config, require_same_weights

CONFIG_KEY = "crane"
MASKS_VARIABLE = "CRANE_MASKS"
DEFAULT_METHOD_VARIABLE = "CRANE_DEFAULT_METHOD"
ROWS_VARIABLE = "CRANE_MASK_ROWS"
OUTPUTS_VARIABLE = "CRANE_MASK_OUTPUTS"
OFFSETS_VARIABLE = "CRANE_MASK_OFFSETS"
INLINE_VARIABLE = "CRANE_INLINE_MASKS"
ACTIVATIONS_VARIABLE = "CRANE_ACTIVATIONS"
GATES_VARIABLE = "CRANE_GATES"
DISABLE_VARIABLE = "CRANE_DISABLE"


class MaskConfig(dict[str, Any]):
    """Entry of `VllmConfig.additional_config`.

    Its items change the compiled graph and so become part of vLLM's compile-cache key: without them an artefact that
    was compiled without masks could serve a masked request. Its attributes are sent to other processes too, but are not
    part of the key, since new masks need no new compilation. A process that receives a MaskConfig installs the plugin
    or fails: vLLM itself would only log that a plugin does not load, and run masked requests unmasked.
    """

    def __init__(
        self,
        rows: int,
        outputs: bool,
        offsets: bool,
        model: str,
        masks: Path,
        default_method: str,
        manifest: str,
        commit: str | None = None,
        allows_inline: bool = False,
        activations: bool = False,
        gates: bool = False,
    ) -> None:
        version, seen = crane_serve.__version__, {"activations": activations or gates, "gates": gates}
        super().__init__(plugin=version, rows=rows, outputs=outputs, offsets=offsets, **seen)
        self.model = model
        self.masks = masks
        self.default_method = default_method
        self.manifest = manifest
        self.commit = commit  # of a hub id
        self.allows_inline = allows_inline  # whether requests may bring masks with them
        self._library: MaskLibrary | None = None

    @property
    def rows(self) -> int:
        """How many different masks can be resident; the table has one row more, row 0, which is all ones."""
        return int(self["rows"])

    @property
    def outputs(self) -> bool:
        """Whether MLP output dimensions can be scaled; the graph multiplies them only if some mask does."""
        return bool(self["outputs"])

    @property
    def offsets(self) -> bool:
        """Whether masks can add to neurons; the graph adds only if some mask does."""
        return bool(self["offsets"])

    @property
    def activations(self) -> bool:
        """Whether requests can ask for the values of neurons; the graph stores them only if they can."""
        return bool(self["activations"])

    @property
    def gates(self) -> bool:
        """Whether these can be of act(gate) and up, too; the graph stores what they are made of only if they can."""
        return bool(self["gates"])

    def library(self) -> MaskLibrary:
        """This process's masks of the engine, read when first asked for.

        Raises MaskFileError if the directory changed since the engine was configured: all processes must agree on it.
        """
        if self._library is None:
            fingerprint = Fingerprint.of(resolve_checkpoint(self.model, self.commit))
            library = MaskLibrary.load(self.masks, fingerprint, self.default_method)
            if library.manifest != self.manifest:
                raise MaskFileError(f"{self.masks} changed while the engine was starting; start it again")
            library.allows_inline = self.allows_inline
            self._library = library
        return self._library

    @property
    def fields(self) -> tuple[Any, ...]:
        """The arguments of the constructor."""
        shape, switches = (self.rows, self.outputs, self.offsets), (self.allows_inline, self.activations, self.gates)
        return (*shape, self.model, self.masks, self.default_method, self.manifest, self.commit, *switches)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("only a process with the crane plugin can send its configuration on")  # see `plugin`


def masks_disabled() -> bool:
    """Whether the kill switch CRANE_DISABLE=1 is set."""
    return flag(DISABLE_VARIABLE)


def flag(variable: str) -> bool:
    """Whether an environment variable is set to something other than 0."""
    return os.environ.get(variable, "") not in ("", "0")


def _rows() -> int:
    value = os.environ.get(ROWS_VARIABLE, str(DEFAULT_ROWS))
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{ROWS_VARIABLE} is {value!r}, expected the number of masks to keep resident, at least 1")
    return int(value)


def _switch(variable: str) -> bool:
    """An environment variable that says yes or no, and nothing else. Raises ValueError."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{variable} is {value!r}, expected 0 or 1")
    return value == "1"


def masks_wanted() -> bool:
    """Whether an engine that starts now is to have masks."""
    return bool(os.environ.get(MASKS_VARIABLE)) and not masks_disabled()


def add_mask_config(vllm_config: Any) -> None:
    """Put a MaskConfig into a new VllmConfig if CRANE_MASKS names a directory of masks, or a repository of the Hub.

    A hub id is pinned to the commit that the fingerprint is of, and masks of the Hub to theirs. Raises MaskFileError
    when the directory does not exist, HubMasksError when masks cannot be fetched, FingerprintError when the model
    cannot be identified, CheckpointError when vLLM would not load its weights or not all of them, or a config from
    elsewhere, ValueError for a variable with an unusable value, or a name of a repository that is none.
    """
    if not masks_wanted():
        return
    directory = os.environ[MASKS_VARIABLE]
    default_method, rows = os.environ.get(DEFAULT_METHOD_VARIABLE, DEFAULT_METHOD), _rows()
    switches = tuple(map(_switch, (INLINE_VARIABLE, ACTIVATIONS_VARIABLE, GATES_VARIABLE)))
    model_config, masks = vllm_config.model_config, mask_directory(directory).resolve()
    model = str(model_config.model)
    require_own_config(model_config)
    commit = None
    if Path(model).is_dir():  # perhaps put there by vLLM itself, which then keeps a revision that means nothing
        checkpoint = resolve_checkpoint(model)
    else:
        checkpoint = resolve_checkpoint(model, model_config.revision)
        model_config.revision = commit = checkpoint.name
    library = MaskLibrary.load(masks, Fingerprint.of(checkpoint), default_method)
    require_same_weights(vllm_config, checkpoint)
    if library.fingerprint.experts is not None:
        _choose_experts(vllm_config.kernel_config)
        if flag(OUTPUTS_VARIABLE):
            raise ValueError(f"{OUTPUTS_VARIABLE}: masks of MLP outputs are not known for models with experts")
    outputs = flag(OUTPUTS_VARIABLE) or any(stored.mask.output is not None for stored in library.masks.values())
    offsets = flag(OFFSETS_VARIABLE) or any(stored.mask.offset is not None for stored in library.masks.values())
    of = (model, masks, default_method, library.manifest, commit)
    config = MaskConfig(rows, outputs, offsets, *of, *switches)
    vllm_config.additional_config = {**vllm_config.additional_config, CONFIG_KEY: config}


def _choose_experts(kernel_config: Any) -> None:
    """On a GPU, masks need vLLM's Triton experts; whoever has asked for others is refused when the model is loaded."""
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    if current_platform.is_cuda_alike() and kernel_config.moe_backend == "auto":
        kernel_config.moe_backend = "triton"
        init_logger("vllm.crane").info("experts are computed by --moe-backend triton, which masks can reach")


def mask_config(vllm_config: Any) -> MaskConfig | None:
    """The MaskConfig of an engine, or None for an engine that was started without masks.

    Raises TypeError if something else stands in its place.
    """
    extra = vllm_config.additional_config
    config = extra.get(CONFIG_KEY) if isinstance(extra, Mapping) else None
    if config is not None and not isinstance(config, MaskConfig):
        raise TypeError(f"additional_config[{CONFIG_KEY!r}] is reserved for the crane plugin")
    return config
