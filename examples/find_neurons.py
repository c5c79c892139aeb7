# %% [markdown]
# # Find the neurons a language needs, in your own model
#
# Relevance is measured on one split of a corpus, a mask is made of the neurons that rank highest, and what it costs
# each language is measured on another split. Run it whole (`python examples/find_neurons.py`), or cell by cell in an
# editor that knows `# %%`.

# %%
import os
from pathlib import Path

import torch

from crane_serve.common.models.families import take_apart
from crane_serve.common.models.load import load_tokenizer
from crane_serve.common.models.resolve import resolve_checkpoint
from crane_serve.common.text.corpus import EMBEDDED_CORPUS
from relevance.causal import losses, masked
from relevance.encoding import encode
from relevance.methods import find_scored
from relevance.model import load_model, pick_device, pick_dtype
from relevance.scoring import score
from relevance.selection import select
from relevance.selection_options import SelectionOptions
from relevance.sources import load_corpus

# A checkpoint directory or a hub id; a directory of {lang}.jsonl or {lang}.txt, or hf:NAME.
MODEL = os.environ.get("EXAMPLE_MODEL", "models/gemma-3-270m")
CORPUS = os.environ.get("EXAMPLE_CORPUS", str(EMBEDDED_CORPUS))
OUT = Path(os.environ.get("EXAMPLE_OUT", "results/find_neurons"))
DOCUMENTS = int(os.environ.get("EXAMPLE_DOCUMENTS", "20"))  # of each language
BUDGET = 0.01  # fraction of all MLP neurons

# %% [markdown]
# ## Relevance
# One AttnLRP pass serves `attnlrp` and `crane`; `lape` listens to it, and `random` is the control.

# %%
checkpoint = resolve_checkpoint(MODEL)
device = pick_device(None)
dtype = pick_dtype(None, device)
scores = score(
    checkpoint,
    load_corpus(CORPUS, "relevance", None, "text").spread(DOCUMENTS),
    find_scored(["attnlrp", "lape", "random"]),
    batch_tokens=512 if device.type == "cpu" else 2048,
    max_tokens=2048,
    dtype=dtype,
    device=device,
)
OUT.mkdir(parents=True, exist_ok=True)
scores.save(OUT / "scores.safetensors")
print(
    f"{scores.shape.neurons} neurons in {len(scores.shape.sizes)} layers, languages {', '.join(scores.shape.languages)}"
)

# %% [markdown]
# ## Masks
# One file for each method and language; `random` takes as many neurons of each layer as `attnlrp`.

# %%
masks = {}
for method in ("attnlrp", "lape", "random"):
    selection = select(scores, SelectionOptions(method, budget=BUDGET))
    selection.write(OUT / "masks", scores)
    masks |= {f"{method}-{language}": mask for language, mask in selection.masks.items()}

for language in scores.shape.languages:
    mask = masks[f"attnlrp-{language}"]
    by_layer = (mask.intermediate == 0).sum(dim=1).tolist()
    print(f"attnlrp-{language}: {mask.neurons} neurons, by layer {by_layer}")

# %% [markdown]
# ## What they cost
# Nats per token on documents that relevance has not seen: a language needs its neurons if it loses more than the others
# do, and more than it loses under random neurons.

# %%
decoder = take_apart(load_model(checkpoint, dtype, device))
tokenizer = load_tokenizer(checkpoint)
test = load_corpus(CORPUS, "test", list(scores.shape.languages), "text").spread(DOCUMENTS)
documents = {
    name: encode(tokenizer, name, texts, 2048, decoder.vocabulary).token_ids for name, texts in test.documents.items()
}


def nats(mask_name: str | None) -> dict[str, float]:
    """Nats per token of each language under a mask."""
    with masked(decoder, None if mask_name is None else masks[mask_name]), torch.no_grad():
        return {name: losses(decoder, token_ids, 512).per_token for name, token_ids in documents.items()}


unmasked = nats(None)
print(f"{'mask':14}" + "".join(f"{name:>9}" for name in unmasked))
for name in masks:
    changes = {language: loss - unmasked[language] for language, loss in nats(name).items()}
    print(f"{name:14}" + "".join(f"{change:+9.3f}" for change in changes.values()))

# %% [markdown]
# ## Next
# `crane serve MODEL --masks results/find_neurons/masks` serves them; `crane validate` does the measuring above for all
# methods and budgets; `crane learn` finds neurons that cost the others far less.
