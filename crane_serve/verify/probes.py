"""The texts and batches that are run."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from crane_serve.engine.offline import Request

TEXTS = (
    "The baker opens the shop before sunrise and sells the first loaves to the fishermen.",
    "Our train was late because snow had covered the signals near the bridge.",
    "面包师在日出之前开门,把第一批面包卖给渔民。",
    "因为雪盖住了桥边的信号灯,我们的火车晚点了。",
    "Người thợ làm bánh mở cửa trước bình minh và bán những ổ bánh đầu tiên cho ngư dân.",
    "Chuyến tàu của chúng tôi bị trễ vì tuyết phủ kín đèn tín hiệu gần cây cầu.",
)
_LONG_TOKENS = 300
_REQUESTS = 12
_THROUGHPUT_REQUESTS = 32

Encode = Callable[[str], tuple[int, ...]]


def long_prompt(encode: Encode, tokens: int) -> tuple[int, ...]:
    """A prompt of that many tokens, of all texts in turn."""
    ids: tuple[int, ...] = ()
    while len(ids) < tokens:
        ids = encode(" ".join(TEXTS)) + ids
    return ids[:tokens]


def batch(encode: Encode, max_tokens: int) -> list[Request]:
    """Prompts and completions of many lengths, so that one step has whole prefills, chunks of prefills, and decoding.

    max_tokens: the longest sequence that the engine takes. Long prompts are not scored: their logits would be large.
    """
    requests = []
    for index in range(_REQUESTS):
        generated = 4 + 3 * (index % 4)
        room = max_tokens - generated - 1
        if index % 5 == 3:
            requests.append(Request(long_prompt(encode, min(room, _LONG_TOKENS + index)), generated))
        else:
            requests.append(Request(encode(TEXTS[index % len(TEXTS)])[:room], generated, score=True))
    return requests


def throughput_batch(encode: Encode, generated: int) -> list[Request]:
    """Short prompts with `generated` tokens each."""
    return [Request(encode(TEXTS[index % len(TEXTS)])[:8], generated) for index in range(_THROUGHPUT_REQUESTS)]


def masked(requests: Sequence[Request], masks: Sequence[str | None], run: str) -> list[Request]:
    """The batch with a mask for each request, and with salts, so that no request reuses cached blocks of another
    request or run."""
    return [
        replace(request, mask=mask, salt=f"verify-{run}-{index}")
        for index, (request, mask) in enumerate(zip(requests, masks, strict=True))
    ]
