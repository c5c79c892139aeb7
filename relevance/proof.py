"""The proof at load: a model's logits are what its parts, as relevance uses them, make of a few tokens."""

from typing import Any

import torch
from torch import Tensor, nn

from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.families import Decoder
from relevance.model_passes import last_hidden
from relevance.rules import PLAIN, soft_cap

_TOKENS = 32
_NATS = {torch.float64: 1e-6, torch.float32: 1e-3}
_ROUNDED_NATS = 0.05  # in dtypes of 16 bits


@torch.no_grad()
def prove_logits(model: nn.Module, decoder: Decoder) -> None:
    """Compare log-probabilities of the model's own forward pass with those of trunk, scale, unembedding and soft cap.

    Raises UnsupportedModelError where they differ by more than rounding, on average: the model does something with its
    logits, or with its token ids, that is not known, such as a scale of its own or embeddings of each layer; and where
    a hidden state depends on later tokens. A model whose own are not finite passes: the layer where it overflows is
    named when it is measured.
    """
    whole: Any = model
    name, device = type(model).__name__, decoder.unembedding.weight.device
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(decoder.vocabulary, (1, _TOKENS), generator=generator).to(device)
    other = token_ids.clone()
    other[0, -1] = (other[0, -1] + 1) % decoder.vocabulary
    try:
        hidden, of_other = (
            last_hidden(decoder, decoder.embedding(ids)) for ids in (token_ids, other)
        )  # [1, tokens, hidden]
    except Exception as error:  # whatever a trunk raises that needs more than embeddings
        raise UnsupportedModelError(f"{name} does not run on the embeddings of its tokens alone: {error}") from error
    own: Tensor = whole(token_ids, use_cache=False).logits  # [1, tokens, vocabulary]
    if not bool(own.isfinite().all()):
        return
    if not torch.allclose(hidden[:, :-1], of_other[:, :-1], rtol=1e-2, atol=1e-4):
        raise UnsupportedModelError(f"{name} lets a position see later tokens; expected a causal model")
    logits = hidden @ decoder.unembedding.weight.T
    if decoder.final_softcap is not None:
        logits = soft_cap(logits, decoder.final_softcap, PLAIN)
    size = min(own.shape[-1], logits.shape[-1])
    apart = [part[..., :size].double().log_softmax(-1).gather(-1, token_ids.unsqueeze(-1)) for part in (own, logits)]
    difference = float((apart[0] - apart[1]).abs().mean())
    if not difference <= _NATS.get(logits.dtype, _ROUNDED_NATS):
        raise UnsupportedModelError(
            f"{name}: log-probabilities of its parts differ from its own by {difference:.2g} nats on average; "
            "something that it does to embeddings or logits is not known"
        )
