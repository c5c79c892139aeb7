"""Served: statistics of activations from a running server, which returns their means over the tokens of a document."""

import base64
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import torch
from torch import Tensor

from crane_serve.common.defaults import KEY_VARIABLE, MAX_ACTIVATIONS
from crane_serve.common.masks import Fingerprint
from crane_serve.common.models.decoder import Decoder, KnownLayer
from crane_serve.common.models.prefix import encode_from_start
from crane_serve.common.text.corpus import Corpus
from relevance.encoding import EncodedDocuments, hashed
from relevance.method import (
    Measured,
    Method,
    MethodError,
    OfActivations,
    Reduced,
    ScoredMethod,
    ScoreSource,
    Units,
)

OF_SERVER = "of the server"
"""In place of a number format, which a server does not tell."""

_REDUCTIONS = {"mean": "mean", "mean_abs": "mean_abs"}  # by the field of `Reduced`
_AT_ONCE = 4
_TRIES, _PAUSE_S = 120, 1.0
_TIMEOUT_S = 600.0


class ServerError(ValueError):
    """The server cannot be reached, or refuses what it is asked; the message names it."""


def not_served(method: type[Method], decoder: Decoder) -> str | None:
    """Why a method cannot be computed through a server; None if it can."""
    if method.source is ScoreSource.NOTHING:
        return None
    if not issubclass(method, OfActivations):
        return "needs gradients, and a server computes none"
    if any(group.of_experts for layer in decoder.layers for group in layer.groups):
        return "a server does not return the neurons of experts"
    if method.take is OfActivations.take:
        return "does not say how it is computed from means over a document"
    return None


def needs_gates(method: type[Method], decoder: Decoder) -> bool:
    """Whether a method that a server can compute needs one that was started with gates."""
    return bool(set(reductions([method], decoder).values()) & {"act_positive", "up_mean_abs"})


def require_served(methods: Sequence[type[ScoredMethod]], decoder: Decoder) -> None:
    """Raise MethodError for the first method that cannot be computed through a server, with the reason."""
    for method in methods:
        why = not_served(method, decoder)
        if why is not None:
            raise MethodError(f"method {method.name} cannot be computed through a server: it {why}")


def reductions(methods: Sequence[type[Method]], decoder: Decoder) -> dict[str, str]:
    """What a server is asked for, by the field of `Reduced`; of gates only if a method reads them."""
    read = {part for method in methods if issubclass(method, OfActivations) for part in method.reads}
    wanted = dict(_REDUCTIONS)
    if "act" in read:  # without a gate the neurons are act
        gated = not all(isinstance(layer, KnownLayer) and not layer.gated for layer in decoder.layers)
        wanted["act_positive"] = "act_positive" if gated else "positive"
    if "up" in read:
        wanted["up_mean_abs"] = "up_mean_abs"
    return wanted


class Server:
    """A crane server that was started with activations. To be used as a context. reductions: see `reductions`.

    Raises ServerError if it cannot be reached, and FingerprintError if it serves another model.
    """

    def __init__(
        self,
        url: str,
        fingerprint: Fingerprint,
        transport: httpx.BaseTransport | None = None,
        *,
        reductions: Mapping[str, str] = _REDUCTIONS,
    ) -> None:
        self._url = url
        self._reductions = reductions
        key = os.environ.get(KEY_VARIABLE)
        headers = {} if not key else {"Authorization": f"Bearer {key}"}
        try:
            self._http = httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT_S, transport=transport)
        except (httpx.InvalidURL, ValueError) as error:
            raise ServerError(f"{url!r} is not an http address: {error}") from error
        ready = self._ask("GET", "/ready")
        fingerprint.require(Fingerprint.model_validate(ready["fingerprint"]), f"the server at {url}")
        self._sizes = fingerprint.intermediate_sizes
        self._context_tokens: int = ready["max_model_tokens"]
        if self.max_tokens < 2:
            raise ServerError(f"{url} reads no more than {self.max_tokens} tokens of a document, expected at least 2")

    @property
    def max_tokens(self) -> int:
        """Most tokens of a document: an engine reads all tokens of its context but the last."""
        return self._context_tokens - 1

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.close()

    def means(self, text: str, token_ids: Sequence[int]) -> list[Reduced]:
        """The means over the counted tokens of a document, layer by layer.

        text: of the document, or enough of it (see `enough_of`); token_ids: of the document, cut, with its start token.
        Raises ServerError.
        """
        layers: list[Reduced] = []
        for group in self._groups():
            body = {"text": [text], "truncate": len(token_ids), "return_prompts": True}
            body["activations"] = self._wanted(group)
            answer = self._ask("POST", "/score", body)
            [read] = answer["prompts"]
            if read != list(token_ids):
                raise ServerError(f"{self._url} reads other tokens than the checkpoint's tokenizer makes")
            seen = answer["activations"]
            for layer in seen["layers"]:
                values = {field: _decoded(layer[reduction]) for field, reduction in self._reductions.items()}
                layers.append(Reduced(layer["layer"], seen["tokens"], hashed(token_ids), **values))
        return layers

    def _groups(self) -> Iterator[list[int]]:
        """The layers, as many at a time as one request may have."""
        group: list[int] = []
        for layer, size in enumerate(self._sizes):
            if group and (sum(self._sizes[each] for each in group) + size) * len(self._reductions) > MAX_ACTIVATIONS:
                yield group
                group = []
            group.append(layer)
        yield group

    def _wanted(self, layers: list[int]) -> dict[str, Any]:
        return {"layers": layers, "reduce": list(self._reductions.values()), "first": 1, "encoding": "base64"}

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        for _ in range(_TRIES):
            try:
                response = self._http.request(method, path, json=body)
            except httpx.HTTPError as error:
                raise ServerError(f"{self._url} cannot be reached: {error}") from error
            if response.status_code not in (429, 503):
                break
            time.sleep(_PAUSE_S)
        if response.is_success:
            return response.json()
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"status {response.status_code}"
        raise ServerError(f"{self._url}{path}: {message}")


def enough_of(text: str, tokenizer: Any, token_ids: Sequence[int]) -> str:
    """A beginning of `text` that begins with the same tokens: a server takes no text of far more than its context."""
    size = len(token_ids)
    while size < len(text):
        if encode_from_start(tokenizer, text[:size])[: len(token_ids)] == token_ids:
            return text[:size]
        size *= 2
    return text


def _decoded(values: str) -> Tensor:
    """float64 [neurons]."""
    return torch.frombuffer(bytearray(base64.b64decode(values)), dtype=torch.float32).double()


def measure_served(
    server: Server,
    corpus: Corpus,
    encoded: Mapping[str, EncodedDocuments],
    tokenizer: Any,
    methods: Sequence[type[Measured]],
    units: Units,
    advance: Callable[[int], None],
) -> Iterator[tuple[str, list[Measured]]]:
    """Every language, in order, with its methods, which have taken in all its documents.

    advance: called for every document. Raises ServerError naming the document.
    """
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(_AT_ONCE, "served"))
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        for language, of_language in encoded.items():
            skipped = set(of_language.skipped)
            documents = [document for document in corpus.documents[language] if document.id not in skipped]
            instances = [method(units) for method in methods]
            pairs = zip(documents, of_language.token_ids, strict=True)
            texts = [enough_of(document.text, tokenizer, token_ids) for document, token_ids in pairs]
            answers = pool.map(server.means, texts, of_language.token_ids)
            for document in documents:
                try:
                    layers = next(answers)
                except ServerError as error:
                    raise ServerError(f"{language}: document {document.id!r}: {error}") from error
                for reduced in layers:
                    for instance in instances:
                        assert isinstance(instance, OfActivations), "`require_served` refuses others"
                        instance.take(reduced)
                advance(1)
            yield language, instances
