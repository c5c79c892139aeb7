"""Random request bodies against a running server: `python -m tests.fuzz.bodies URL [--count 500] [--seed 0]`.

Every body starts as a valid one that asks for a mask, and is changed by one to three mutations. What must hold: no
answer of 500 or above, every refusal in the shape of an error, the server ready after each, and no token computed
unmasked for a body that still asks for a mask, rightly spelt or not. The last is seen by the server's own count of
tokens by mask, so that no answer needs to be understood. Exits with 1 and the bodies that broke a rule.
"""

import argparse
import copy
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.tiny import BEYOND

MASK = "zh"
TIMEOUT_S = 120
_TEXT = "Hà Nội là thủ đô, 河内。"
_CHAT = [{"role": "user", "content": _TEXT}]
SEEDS: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": _TEXT, "max_tokens": 4, "temperature": 0},
    "/score": {"context": _TEXT, "continuations": ["yes", "no"]},
    "/v1/completions": {"model": "tiny", "prompt": _TEXT, "max_tokens": 4, "temperature": 0},
    "/v1/chat/completions": {"model": "tiny", "messages": _CHAT, "max_tokens": 4},
    "/v1/responses": {"model": "tiny", "input": _TEXT, "max_output_tokens": 4},
    "/v1/messages": {"model": "tiny", "messages": _CHAT, "max_tokens": 4},
    "/inference/v1/generate": {"model": "tiny", "token_ids": [0, 74, 75], "sampling_params": {"max_tokens": 4}},
}
MISSPELT = (
    "masks",
    "maks",
    "Mask",
    "mask_name",
    "neuron_mask",
    "language_mask",
    "crane_mask",
    "maske",
    "mask ",
    "MASK",
)
OBJECTS = ("metadata", "extra_body", "extra_args", "sampling_params", "vllm_xargs", "chat_template_kwargs")
POSITIONS = ("position", "Positions", "mask_positions", "positon", "crane_positions")
JUNK: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 1.5, 1e308, -(2**63), 2**63, 10**30, float("nan"), float("inf")),
    *("", " ", "zh", "none", "x" * 3000, "\ud800", "\x00", BEYOND, f"a{BEYOND}b", "<s><s>", "\ufeff"),
    *([], {}, [[]], [[0, 300]], [258], [-1], ["a", 1], {"mask": "zh"}, [{"role": "user"}], {"type": "json_object"}),
)
FIELDS = (
    *("n", "best_of", "logprobs", "top_logprobs", "echo", "stream", "stop", "seed", "top_k", "top_p", "min_p"),
    *("min_tokens", "bad_words", "logit_bias", "allowed_token_ids", "stop_token_ids", "prompt_logprobs", "suffix"),
    *("repetition_penalty", "presence_penalty", "response_format", "structured_outputs", "tools", "tool_choice"),
    *("truncate_prompt_tokens", "add_special_tokens", "add_bos", "positions", "user", "metadata", "vllm_xargs"),
    *("logits_processors", "extra_body", "cache_salt", "priority", "request_id", "prompt_embeds", "use_beam_search"),
)


@dataclass
class Case:
    """A request on its way to be sent, which asks for a mask somewhere."""

    path: str
    body: Any
    query: str = ""
    raw: bytes | None = None
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})

    @property
    def content(self) -> bytes:
        return self.raw if self.raw is not None else json.dumps(self.body).encode()


def seed_case(draw: random.Random) -> Case:
    """A valid request for MASK, by one of the ways to name it."""
    path = draw.choice(list(SEEDS))
    body = copy.deepcopy(SEEDS[path])
    way = draw.choice(("query", "body", "object", "model", "xargs"))
    if way == "model" and "model" in body:
        body["model"] = f"tiny:{MASK}"
    elif way == "xargs" and path in ("/v1/completions", "/v1/chat/completions"):
        body["vllm_xargs"] = {"crane_mask": MASK}
    elif way == "query":
        return Case(path, body, f"mask={MASK}")
    elif way == "object":
        body["mask"] = {"neurons": {"0": [3, 5], "1": [0]}}
    else:
        body["mask"] = MASK
    return Case(path, body)


def rename_mask(case: Case, draw: random.Random) -> None:
    """Misspell the mask: it must be refused, or taken; never dropped."""
    wrong = draw.choice(MISSPELT)
    if case.query:
        case.query = f"{wrong}={MASK}"
    elif "mask" in case.body:
        case.body[wrong] = case.body.pop("mask")
    elif "vllm_xargs" in case.body:
        case.body["vllm_xargs"] = {wrong: MASK}
    else:
        case.body["model"] = "tiny"
        case.body[wrong] = MASK


def nest_mask(case: Case, draw: random.Random) -> None:
    """Ask for the mask inside an object where nobody looks for it."""
    place = draw.choice(OBJECTS)
    there = case.body.get(place)
    case.body[place] = {**(there if isinstance(there, dict) else {}), draw.choice(("mask", *MISSPELT)): MASK}


def deform_mask(case: Case, draw: random.Random) -> None:
    """Put junk into a mask in the body."""
    mask = case.body.get("mask")
    if not isinstance(mask, dict):
        return
    match draw.randrange(4):
        case 0:
            mask[draw.choice(("neurons", "scale", "offset", "output"))] = draw.choice(JUNK)
        case 1:
            mask["neurons"] = {draw.choice(("0", "00", "-1", "99", "x", "\ud800")): draw.choice((*JUNK, [1]))}
        case 2:
            mask["neurons"] = {"0": [draw.choice((*JUNK, 7))]}
        case _:
            mask["neurons"] = {"0": list(range(draw.choice((1, 100, 20_000))))}


def add_positions(case: Case, draw: random.Random) -> None:
    """Misspell the positions, or what they are: the mask would be for other tokens than those asked for."""
    wrong = ("prompt", "generated", "none", 3, "prompt[3]", "generated[-4:]", "all;until=3", "all+until=999999999")
    case.body[draw.choice((*POSITIONS, "positions"))] = draw.choice(wrong)


def replace_value(case: Case, draw: random.Random) -> None:
    """Put junk in the place of a value."""
    name = draw.choice(list(case.body))
    if not _asks(name, case.body[name]):
        case.body[name] = draw.choice(JUNK)


def add_field(case: Case, draw: random.Random) -> None:
    """A field that vLLM knows, with junk or with something plausible in it."""
    name = draw.choice(FIELDS)
    if name not in case.body:
        case.body[name] = draw.choice((*JUNK, 2, 4, 0.5, "a", ["a"], {"5": 1}, {"type": "text"}))


def drop_field(case: Case, draw: random.Random) -> None:
    """Leave a field out."""
    name = draw.choice(list(case.body))
    if not _asks(name, case.body[name]):
        del case.body[name]


def _asks(name: str, value: Any) -> bool:
    """Whether a field asks for the mask: without it, or with junk in it, the case would ask for nothing."""
    return name in ("mask", *MISSPELT, *OBJECTS) or (name == "model" and value != "tiny")


def deform_bytes(case: Case, draw: random.Random) -> None:
    """Break the JSON itself: cut it, repeat a key, nest it deeply, or write it in another encoding."""
    content = json.dumps(case.body)
    match draw.randrange(7):
        case 0:
            case.raw = content.encode()[: draw.randrange(len(content))]
        case 1:
            case.raw = f'{{"mask": "none", {content[1:]}'.encode()
        case 2:
            case.raw = f'{content[:-1]}, "extra": {"[" * 5000}{"]" * 5000}}}'.encode()
        case 3:
            case.raw = content.encode("utf-16")
        case 4:
            case.raw = bytes(draw.randrange(256) for _ in range(200))
        case 5:
            case.raw = f"[{content}]".encode()
        case _:
            case.headers = {"content-type": draw.choice(("text/plain", "multipart/form-data; boundary=x", "", "a/b"))}


MUTATIONS: tuple[Callable[[Case, random.Random], None], ...] = (
    *(rename_mask, nest_mask, deform_mask, add_positions),
    *(replace_value, replace_value, add_field, add_field, drop_field),
)


def make_case(draw: random.Random) -> Case:
    """A seed after one to three mutations, the last of which may be of its bytes."""
    case = seed_case(draw)
    for mutation in draw.choices(MUTATIONS, k=draw.randint(1, 3)):
        if case.body:
            mutation(case, draw)
    if draw.random() < 0.15:
        deform_bytes(case, draw)
    return case


def unmasked_tokens(client: httpx.Client) -> float:
    """How many tokens the server has computed without a mask."""
    lines = client.get("/metrics").text.splitlines()
    counted = [line for line in lines if line.startswith("crane_tokens_total") and 'mask="none"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in counted)


def broken_rule(client: httpx.Client, case: Case, *, counting: bool) -> tuple[int, str | None]:
    """Send a case; its status, and the rule that the answer breaks, if any. counting: whether to compare the count of
    unmasked tokens before and after, and to ask whether the server is ready."""
    before = unmasked_tokens(client) if counting else 0.0
    query = f"?{case.query}" if case.query else ""
    answer = client.post(f"{case.path}{query}", content=case.content, headers=case.headers)
    if answer.status_code >= 500:
        return answer.status_code, f"{answer.status_code}: {answer.text[:300]}"
    if answer.status_code >= 400:
        try:
            message = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            return answer.status_code, f"{answer.status_code} without an error's shape: {answer.text[:300]}"
        if not message or "Traceback" in message:
            return answer.status_code, f"{answer.status_code} says {message[:300]!r}"
    if not counting:
        return answer.status_code, None
    if unmasked_tokens(client) != before:
        return answer.status_code, f"{answer.status_code}, and tokens were computed unmasked: {answer.text[:300]}"
    if client.get("/ready").status_code != 200:
        return answer.status_code, "the server is not ready afterwards"
    return answer.status_code, None


def run(url: str, count: int, seed: int, *, counting: bool = True) -> tuple[Counter[int], list[str]]:
    """Send `count` cases; the statuses, and what broke. counting: see `broken_rule`."""
    draw = random.Random(seed)
    statuses: Counter[int] = Counter()
    broken = []
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
        for number in range(count):
            case = make_case(draw)
            status, rule = broken_rule(client, case, counting=counting)
            statuses[status] += 1
            if rule is not None:
                broken.append(f"{number}: POST {case.path}?{case.query} {case.content[:600]!r}\n    {rule}")
    return statuses, broken


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    statuses, broken = run(arguments.url, arguments.count, arguments.seed)
    print("\n".join(broken))
    counts = dict(sorted(statuses.items()))
    print(f"{arguments.count} bodies, seed {arguments.seed}: statuses {counts}; {len(broken)} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
