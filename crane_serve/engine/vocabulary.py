"""Token ids that the model has no embedding for: a prompt with one is refused, and stop tokens among them are dropped.

A tokenizer may know tokens that the model does not. vLLM compares a prompt with the larger of both vocabularies, since
a placeholder of an image may lie beyond the model's; such an id in a text would crash the engine, or be embedded as
another token. The vocabulary is that of the model's config; when the weights are loaded, the embedding is checked
against it.
"""

from collections.abc import Callable, Sequence
from typing import Any


def require_embeddings(vllm_config: Any, request: Any, tokenizer: Any = None) -> None:
    """Raise VLLMValidationError naming the first token of an EngineCoreRequest that the model has no embedding for.

    Placeholders of images and the like, and positions of prompt embeddings, are not checked: vLLM embeds them
    otherwise. tokenizer: to give the token's text in the message, too.
    """
    token_ids = request.prompt_token_ids
    vocabulary = vocabulary_size(vllm_config.model_config)
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocabulary):
        return
    embedded: set[int] = set()
    for feature in request.mm_features or ():
        start = feature.mm_position.offset
        embedded.update(range(start, start + feature.mm_position.length))
    is_token = request.prompt_is_token_ids
    if is_token is not None:
        embedded.update(position for position, is_id in enumerate(is_token) if not is_id)
    for position, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocabulary and position not in embedded:
            raise unknown_token(token_id, position, vocabulary, tokenizer)


def validate_token_ids(original: Callable[..., None], self: Any, token_ids: Sequence[int], **arguments: Any) -> None:
    """Replaces the renderer's own check: the error for an id in neither vocabulary says how large the vocabulary is."""
    from vllm.exceptions import VLLMValidationError

    try:
        original(self, token_ids, **arguments)
    except VLLMValidationError as error:
        vocabulary = vocabulary_size(self.model_config)
        for position, token_id in enumerate(token_ids):
            if not 0 <= token_id < vocabulary:
                raise unknown_token(token_id, position, vocabulary, self.tokenizer) from error
        raise


def drop_impossible(vllm_config: Any, sampling_params: Any) -> None:
    """Remove stop tokens and bad words that the model can never produce from a request's own sampling parameters.

    A tokenizer's end token may be one of them. vLLM would index the logits with it.
    """
    if sampling_params is None:
        return
    vocabulary = vocabulary_size(vllm_config.model_config)
    stops = sampling_params.all_stop_token_ids
    if any(token_id >= vocabulary for token_id in stops):
        sampling_params._all_stop_token_ids = {token_id for token_id in stops if token_id < vocabulary}
    words = sampling_params.bad_words_token_ids
    if words:
        sampling_params._bad_words_token_ids = [word for word in words if max(word, default=0) < vocabulary]


def vocabulary_size(model_config: Any) -> int:
    """How many tokens the model embeds, and gives logits for."""
    return int(model_config.get_vocab_size())


def unknown_token(token_id: int, position: int, vocabulary: int, tokenizer: Any) -> Exception:
    """The error for a token id that the model does not have."""
    from vllm.exceptions import VLLMValidationError

    token = None
    if tokenizer is not None and token_id >= 0:
        token = next(iter(tokenizer.convert_ids_to_tokens([token_id])), None)
    named = f"token {token_id}" if token is None else f"token {token_id} ({token!r})"
    error: Exception = VLLMValidationError(
        f"{named} at position {position} of the prompt is not in the model's vocabulary of {vocabulary} tokens "
        f"(0 to {vocabulary - 1})"
    )
    return error
