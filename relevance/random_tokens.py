"""Random token sequences, scored like a language: what fires on them as much as on a language is not its own."""

from collections.abc import Mapping
from typing import Any

import torch

from relevance.encoding import EncodedDocuments

SEED = 0
KEY = "random+tokens"
"""Stands for a language among those that are measured; no language has such a name."""


def random_documents(tokenizer: Any, documents: Mapping[str, EncodedDocuments], vocabulary: int) -> EncodedDocuments:
    """Documents of tokens drawn uniformly from those of the tokenizer that are not special, by `SEED`.

    documents: by language; there are as many as of the language that has most, and they take the start token and the
    lengths of its first document, of the second of the second language, and so on in turn. vocabulary: how many tokens
    the model has.
    """
    special = set(tokenizer.all_special_ids)
    special |= {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    known = {token_id for token_id in tokenizer.get_vocab().values() if token_id < vocabulary}
    ids = torch.tensor(sorted(known - special))
    generator = torch.Generator().manual_seed(SEED)
    languages = [of.token_ids for of in documents.values()]
    drawn = []
    for number in range(max(map(len, languages))):
        of_language = languages[number % len(languages)]
        start, *rest = of_language[number % len(of_language)]
        drawn.append([start, *ids[torch.randint(len(ids), (len(rest),), generator=generator)].tolist()])
    return EncodedDocuments(tuple(drawn))
