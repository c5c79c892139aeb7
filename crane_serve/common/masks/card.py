"""The card of a repository of masks: README.md, with front matter as the Hugging Face Hub reads it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import yaml

from crane_serve.common.masks.files import StoredMask
from crane_serve.common.masks.fingerprint import Fingerprint
from crane_serve.common.masks.positions import Positions
from crane_serve.common.reports.content import Cell, Section, Table
from crane_serve.common.reports.numbers import percent_text
from crane_serve.common.reports.render import markdown_page

CARD_FILE = "README.md"
LIBRARY = "crane-serve"
# Keys of the front matter that the Hub does not know.
_BASE_COMMIT, _FINGERPRINT, _MEANT_FOR = "base_model_revision", "fingerprint", "positions"
_FRONT_MATTER = re.compile(r"---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
_LAYERS = 3  # that are named for each mask

_ABOUT = (
    "Each file is a mask of MLP neurons: what becomes of every neuron of one model while a request runs under it. A "
    "mask that switches off the neurons which a language needs takes that language away from the request, and leaves "
    "the model as it is for all others.",
    "Masks belong to the model below, by its fingerprint. They are safetensors files and hold no code.",
)
_POSITIONS = {
    Positions.ALL: "all tokens of a request",
    Positions.PROMPT: "the prompt only",
    Positions.GENERATED: "generated tokens only",
}


def front_matter(card: str) -> dict[str, Any]:
    """The YAML at the beginning of a card; empty if there is none that can be read."""
    match = _FRONT_MATTER.match(card)
    try:
        content = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        content = None
    return content if isinstance(content, dict) else {}


def base_model_of(front: Mapping[str, Any], fingerprint: Fingerprint) -> tuple[str | None, str | None]:
    """The hub id and the commit that a card's front matter gives for the model with this fingerprint; None if it gives
    none, or is of another model."""
    if front.get(_FINGERPRINT) != _digests(fingerprint):
        return None, None
    base_model, commit = (front.get(key) for key in ("base_model", _BASE_COMMIT))
    return (base_model if isinstance(base_model, str) else None), (commit if isinstance(commit, str) else None)


def positions_of(front: Mapping[str, Any]) -> Positions:
    """The tokens that masks are meant for by a card's front matter; all, if it does not say."""
    try:
        return Positions.parse(front.get(_MEANT_FOR, "all"))
    except ValueError:
        return Positions.ALL


def mask_card(
    repository: str,
    masks: Sequence[StoredMask],
    *,
    base_model: str | None = None,
    base_commit: str | None = None,
    licence: str | None = None,
    positions: Positions = Positions.ALL,
    effects: Sequence[Section] = (),
) -> str:
    """The card of the repository with these masks, which are of one model; at least one.

    base_model: that model's hub id; base_commit: of it; licence: of the masks, as the Hub abbreviates it; positions:
    which tokens they are meant for; effects: what they cost, as sections of a page.
    """
    front = {
        "license": licence,
        "library_name": LIBRARY,
        "base_model": base_model,
        _BASE_COMMIT: base_commit,
        _FINGERPRINT: _digests(masks[0].info.fingerprint),
        _MEANT_FOR: None if positions == Positions.ALL else str(positions),
        "tags": [LIBRARY, "neuron-mask", *sorted({stored.info.method for stored in masks})],
    }
    written = yaml.safe_dump({key: value for key, value in front.items() if value is not None}, sort_keys=False)
    fingerprint = masks[0].info.fingerprint
    meant_for = _POSITIONS.get(positions, f"the tokens {positions}")
    sections = [
        Section("What this is", _ABOUT),
        Section("Masks", (f"Meant for {meant_for}.",), (_mask_table(masks),)),
        Section("Model", tables=(_model_table(fingerprint, base_model, base_commit),)),
        *effects,
    ]
    page = markdown_page(repository, sections)
    return f"---\n{written}---\n\n{page}{_use(repository, masks[0].name, base_model or 'MODEL', positions)}"


def _digests(fingerprint: Fingerprint) -> dict[str, str]:
    return {"config": fingerprint.config_digest, "weights": fingerprint.weights_digest}


def _mask_table(masks: Sequence[StoredMask]) -> Table:
    columns = ("mask", "language", "method", "budget", "neurons", "what becomes of them", "most in layers", "digest")
    rows = tuple(
        tuple(
            map(
                Cell,
                (
                    stored.name,
                    stored.info.language,
                    stored.info.method + ("" if stored.info.transferred_from is None else ", transferred"),
                    "" if stored.info.budget is None else percent_text(stored.info.budget),
                    f"{stored.mask.neurons:,}",
                    _change(stored),
                    _fullest(stored.mask.neurons_per_layer()),
                    stored.mask.digest[:16],
                ),
            )
        )
        for stored in masks
    )
    return Table(columns, rows)


def _change(stored: StoredMask) -> str:
    """What a mask does to its neurons, in a few words."""
    mask, made = stored.mask, stored.info.parameters
    changed = mask.intermediate[mask.intermediate != 1]
    are_off = not bool(changed.any())
    replaced = mask.offset is not None and are_off and not bool(mask.intermediate[mask.offset != 0].any())
    parts = []
    if len(changed) and not replaced:
        low, high = (float(end) for end in changed.aminmax())
        parts.append("off" if are_off else f"times {low:.3g} to {high:.3g}")
    if mask.offset is not None:
        parts.append("replaced by other values" if replaced else "values added")
        if "intervention" in made:
            parts.append(f"{made['intervention']} with strength {made.get('strength', 1)}")
    if mask.output is not None:
        parts.append(f"{int((mask.output != 1).sum()):,} outputs scaled")
    if mask.experts_off:
        parts.append(f"{mask.experts_off:,} experts not chosen")
    return ", ".join(parts)


def _fullest(counts: Sequence[int]) -> str:
    """The layers with the most neurons, and in how many there are any."""
    ordered = sorted((layer for layer, count in enumerate(counts) if count), key=lambda layer: -counts[layer])
    named = ", ".join(f"{layer} ({counts[layer]:,})" for layer in ordered[:_LAYERS])
    return f"{named}; some in {len(ordered)} of {len(counts)}" if len(ordered) > _LAYERS else named


def _model_table(fingerprint: Fingerprint, base_model: str | None, base_commit: str | None) -> Table:
    sizes = fingerprint.intermediate_sizes
    rows = {
        "model": base_model,
        "commit": base_commit,
        "architecture": fingerprint.architecture,
        "layers": str(fingerprint.layers),
        "hidden size": f"{fingerprint.hidden_size:,}",
        "MLP neurons": f"{sum(sizes):,}",
        "fingerprint of the config": fingerprint.config_digest,
        "fingerprint of the weights": fingerprint.weights_digest,
    }
    return Table(("", ""), tuple((Cell(name), Cell(value)) for name, value in rows.items() if value is not None))


def _use(repository: str, mask: str, model: str, positions: Positions) -> str:
    """How to serve masks, and how to apply one in transformers. All arguments are names without markup."""
    where = "" if positions == Positions.ALL else f"&positions={quote(str(positions))}"
    only = "" if positions == Positions.ALL else "\n`applied` masks all tokens, whatever the masks are meant for.\n"
    return f"""
## Serve

```sh
crane serve {model} --masks hf:{repository}
curl 'localhost:8000/generate?mask={mask}{where}' -H 'content-type: application/json' -d '{{"prompt": "..."}}'
```

## In transformers

```python
from transformers import AutoModelForCausalLM

from crane_serve.common.masks import applied, mask_directory, read_mask

model = AutoModelForCausalLM.from_pretrained("{model}")
stored = read_mask(mask_directory("hf:{repository}") / "{mask}.safetensors")
with applied(model, stored.mask):
    ...
```
{only}"""
