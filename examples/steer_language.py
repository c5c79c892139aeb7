# %% [markdown]
# # Steer the language of the output
#
# A model that may write in any language, with some of them switched off: what is left? Prompts of no language are
# continued under masks and unions of masks (`mask="en,zh"`), and the languages of the continuations are counted.
#
# Needs a server: `crane serve models/gemma-3-270m --masks results/demo/masks`, and masks of `en`, `zh` and `vi`.

# %%
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product

from clients import CraneClient
from crane_serve.common.text.languages import identify

SERVER = os.environ.get("EXAMPLE_SERVER", "http://127.0.0.1:8000")
TOKENS = int(os.environ.get("EXAMPLE_TOKENS", "48"))
LANGUAGES = ("en", "zh", "vi")
# Beginnings that say nothing of the language of what follows.
PROMPTS = ("2019:", "- ", "1. ", "# ", "\n", "(", "A: ", '"', "* ", "10:00 ")
SAMPLES = 4  # of each prompt

# %% [markdown]
# ## One prompt under each mask
# A mask is a name, names joined with commas, or a name with a factor that damps its neurons: `zh@0.5`.

# %%
client = CraneClient(SERVER)
print(f"{client.ready().model}; masks: {', '.join(mask.name for mask in client.masks().masks)}")
for mask in ("none", "zh", "en,zh", "en,zh@0.5"):
    continued = client.generate("长城是", mask=mask, max_tokens=24, temperature=0)
    print(f"{mask:10} {continued.outputs[0].text!r}")

# %% [markdown]
# ## Shares of languages
# A request holds all prompts, and the requests for all masks are under way at once: the server mixes them in its
# batches.


# %%
def shares(texts: Sequence[str]) -> dict[str, float]:
    """Share of each language, of the others together, and of texts too short or mixed to tell."""
    found = Counter(identify(text) or "?" for text in texts)
    known = {language: found.pop(language, 0) for language in (*LANGUAGES, "?")}
    return {name: count / len(texts) for name, count in {**known, "other": found.total()}.items()}


MASKS = ("none", *LANGUAGES, "en,zh", "en,vi", "zh,vi")


def sample(request: tuple[str, int]) -> list[str]:
    """A continuation of each prompt, for a mask and a seed."""
    mask, seed = request
    answer = client.generate(PROMPTS, mask=mask, max_tokens=TOKENS, temperature=1.0, seed=seed)
    return [output.text for output in answer.outputs]


requests = list(product(MASKS, range(SAMPLES)))
texts: dict[str, list[str]] = {mask: [] for mask in MASKS}
with ThreadPoolExecutor(len(requests)) as threads:
    for (mask, _), sampled in zip(requests, threads.map(sample, requests), strict=True):
        texts[mask] += sampled

rows = {mask: shares(of_mask) for mask, of_mask in texts.items()}
print(f"{'switched off':14}" + "".join(f"{name:>8}" for name in rows["none"]))
for mask, row in rows.items():
    print(f"{mask:14}" + "".join(f"{share:8.0%}" for share in row.values()))

# %% [markdown]
# A language that a mask takes away loses its share, and the others gain it. Where instead the share of "?" grows, the
# mask broke the model rather than the language: masks of fewer neurons, by `crane learn`, are gentler.
