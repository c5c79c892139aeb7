"""A config as its model reads it, so that two files that mean the same model have one digest."""

import hashlib
import json
from typing import Any

# Keys about the software around the model, or with a field of their own in the fingerprint (`architectures`). They do
# not change the meaning of a neuron index.
_VOLATILE = {
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "architectures",
    "auto_map",
    "task_specific_params",
    "cache_implementation",
    "sliding_window_pattern",  # transformers makes `layer_types` of it
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
}
# How 0.1.0 digested the file itself.
_VOLATILE_IN_FILE = {"transformers_version", "dtype", "torch_dtype", "use_cache"}


def config_digest(config: Any) -> str:
    """SHA-256 (hex) of the settings of a transformers config that differ from the defaults of its class.

    transformers itself unifies old and new names (`rope_theta`, `rope_parameters`). Defaults are left out, so the
    digest stays the same if a file spells them out, or if a version of transformers adds one.
    """
    return _digest(_settings(config))


def file_digest(raw: dict[str, Any]) -> str:
    """The digest of the unprocessed config file, which masks of version 0.1.0 contain."""
    return _digest({key: value for key, value in raw.items() if _is_stable(key, _VOLATILE_IN_FILE)})


def _settings(config: Any) -> dict[str, Any]:
    defaults = _defaults(type(config))
    settings: dict[str, Any] = {"model_type": config.model_type}
    for key, value in config.to_dict().items():
        part = getattr(config, key, None)
        if hasattr(part, "to_dict") and hasattr(part, "model_type"):  # a config within the config
            settings[key] = _settings(part)
        elif _is_stable(key, _VOLATILE) and (key not in defaults or _plain(value) != _plain(defaults[key])):
            settings[key] = _plain(value)
    return settings


def _defaults(kind: type[Any]) -> dict[str, Any]:
    try:
        defaults: dict[str, Any] = kind().to_dict()
    except Exception:  # a config class that needs arguments has no defaults
        return {}
    return defaults


def _plain(value: Any) -> Any:
    """The value in terms of JSON, where equal numbers have the same form."""
    if isinstance(value, dict):
        # `type` is the old name of `rope_type` and stays beside it
        return {str(key): _plain(entry) for key, entry in value.items() if not (key == "type" and "rope_type" in value)}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _is_stable(key: str, volatile: set[str]) -> bool:
    return key not in volatile and not key.startswith("_")


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
