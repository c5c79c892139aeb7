"""EleutherAI's lm-evaluation-harness, unchanged, against /v1/completions: a mask in its URL, or in its model's name."""

import json
import os
import string
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from clients import CraneClient, Plan, run_evaluation
from tests.conftest import Tiny
from tests.engines import Oracle, Server

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).parent / "run_lm_eval.py"
TIMEOUT_S = 500
STOPS = ["e", "\n"]
NEW_TOKENS = 24
CHOICES = [
    ("The harbour froze in the night, and in the morning the ships", [" lay still.", " sang.", " 停在那里。"]),
    ("夜里港口结冰了，早上船只", ["静静地停着。", "唱起歌来。", " lay still."]),
    ("Đêm qua bến cảng đóng băng, và sáng nay những con tàu", [" nằm im.", " hát vang."]),
    ("White space ends this question:  ", ["yes", " no"]),
    ("", ["Snow fell on the roofs.", "雪落在屋顶上。", "Tuyết rơi trên mái nhà."]),
]
PROMPTS = ["The harbour froze.", "港口结冰了。", "Bến cảng đóng băng.", "One, two, three,", "Chapter 7\n\nThe"]


@dataclass(frozen=True)
class Job:
    """One run of the harness. mask: what its requests run under; url, model: how they say so."""

    mask: str
    query: str
    model: str
    options: str = "num_concurrent=1"


JOBS = {
    "no mask": Job("none", "", "tiny"),
    "?mask=none": Job("none", "?mask=none", "tiny"),
    "?mask=zh": Job("zh", "?mask=zh", "tiny", "num_concurrent=4"),
    "?mask=vi, in batches": Job("vi", "?mask=vi", "tiny", "num_concurrent=2,batch_size=3"),
    "model tiny:zh": Job("zh", "", "tiny:zh", "num_concurrent=1,batch_size=2"),
    "as text": Job("vi", "", "tiny:vi", "tokenized_requests=False"),
}
# The server's own tokenizer, without a start token: the harness never asks for one.
REMOTE = "model tiny:vi, the server's tokenizer"
JOBS_AND_REMOTE = {**JOBS, REMOTE: Job("vi", "", "tiny:vi", "tokenizer_backend=remote,batch_size=2")}
_CHOOSING = """
task: crane_choices
dataset_path: json
dataset_kwargs: {data_files: {test: CHOICES}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
_WRITING = """
task: crane_texts
dataset_path: json
dataset_kwargs: {data_files: {test: TEXTS}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: ""
generation_kwargs: {until: STOPS, max_gen_toks: TOKENS, temperature: 0.0, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def greedy_items(server: Server, mask: str) -> Iterator[tuple[str, list[str]]]:
    """Questions whose first choice greedy decoding gives under a mask: the harness must find it greedy."""
    questions = [f"Item {number}{letter}" for letter in string.ascii_letters for number in range(4)]
    with CraneClient(server.url) as client:
        outputs = client.generate(questions, mask=mask, max_tokens=1, temperature=0).outputs
    letters = [output.text for output in outputs]
    found = [(question, letter) for question, letter in zip(questions, letters, strict=True) if letter.isalnum()]
    for question, letter in found[:6]:
        yield question, [letter, "!"]


@pytest.fixture(scope="module")
def samples(
    tiny: Tiny, tiny_server: Server, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """What the harness logs of each job, by task."""
    directory = tmp_path_factory.mktemp("lm-eval")
    items = [*CHOICES, *(item for mask in ("none", "zh", "vi") for item in greedy_items(tiny_server, mask))]
    rows = {
        "choices": [{"question": question, "choices": choices} for question, choices in items],
        "texts": [{"question": prompt} for prompt in PROMPTS],
    }
    for name, content in rows.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (directory / f"{name}.jsonl").write_text(lines)
    choosing = _CHOOSING.replace("CHOICES", str(directory / "choices.jsonl"))
    writing = _WRITING.replace("TEXTS", str(directory / "texts.jsonl")).replace("STOPS", json.dumps(STOPS))
    (directory / "choices.yaml").write_text(choosing)
    (directory / "texts.yaml").write_text(writing.replace("TOKENS", str(NEW_TOKENS)))
    jobs = [[model_arguments(tiny_server, tiny, job), tasks_of(job)] for job in JOBS_AND_REMOTE.values()]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(directory / "hub")}
    out = directory / "out.json"
    run = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(jobs), str(directory), str(out)],
        env={**os.environ, **offline, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return dict(zip(JOBS_AND_REMOTE, json.loads(out.read_text()), strict=True))


def model_arguments(server: Server, tiny: Tiny, job: Job) -> str:
    url = f"{server.url}/v1/completions{job.query}"
    # Tokens are sent with the start token that the model was trained with; texts get it from the server.
    start = "" if "tokenized_requests=False" in job.options else ",add_bos_token=True"
    tokenizer = f"tokenizer={tiny.checkpoint},tokenizer_backend=huggingface{start},"
    if "tokenizer_backend=remote" in job.options:
        tokenizer = ""
    return f"model={job.model},base_url={url},{tokenizer}max_length=512,max_retries=1,{job.options}"


def tasks_of(job: Job) -> list[str]:
    """The harness takes the tokens of a context to be those that it sent, so that texts are only for generation."""
    return ["crane_texts"] if "tokenized_requests=False" in job.options else ["crane_choices", "crane_texts"]


@pytest.mark.parametrize("name", [name for name, job in JOBS.items() if "crane_choices" in tasks_of(job)])
def test_log_likelihoods_equal_our_own_clients(samples: dict, tiny_server: Server, name: str) -> None:
    checked = greedy = 0
    with CraneClient(tiny_server.url) as client:
        for sample in samples[name]["crane_choices"]:
            for number, (response,) in enumerate(sample["resps"]):
                context, continuation = sample["arguments"][number]
                assert continuation == sample["doc"]["choices"][number]
                logprob, is_greedy = response
                (own,) = client.score_continuations(context, [continuation], mask=JOBS[name].mask).scores
                assert float(logprob) == pytest.approx(own.logprob, abs=1e-3)
                assert is_greedy is own.is_greedy
                checked += 1
                greedy += own.is_greedy
    assert checked > sum(len(choices) for _, choices in CHOICES)
    assert 0 < greedy < checked


@pytest.mark.parametrize("name", ["no mask", "?mask=zh", "?mask=vi, in batches"])
def test_our_own_task_gives_the_same_figures(samples: dict, tiny_server: Server, tmp_path: Path, name: str) -> None:
    logged = sorted(samples[name]["crane_choices"], key=lambda sample: sample["doc_id"])
    rows = [json.dumps(sample["doc"], ensure_ascii=False) + "\n" for sample in logged]
    (tmp_path / "choices.jsonl").write_text("".join(rows))
    task = {"kind": "choice", "source": {"files": "choices.jsonl"}, "question": "{{ question }}",
            "choices": "{{ choices }}", "answer": "0", "delimiter": ""}  # fmt: skip
    mask = JOBS[name].mask
    plan = Plan.parse({"languages": ["en"], "masks": [mask], "tasks": [task]}, "plan")
    out = tmp_path / "out"
    evaluation = run_evaluation(plan, out, server=tiny_server.url, base=tmp_path, concurrency=4)
    (of_mask,) = [of for of in evaluation.masks if mask == "none" or of != "none"]
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    answers = {line["item"]: line["answer"]["scores"] for line in lines if line["mask"] == of_mask}
    assert len(answers) == len(logged)
    for number, sample in enumerate(logged, start=1):
        for (response,), score in zip(sample["resps"], answers[f"row-{number}"], strict=True):
            assert score["logprob"] == pytest.approx(float(response[0]), abs=1e-3)
            assert score["is_greedy"] is response[1]
    for metric, of_harness in (("accuracy", "acc"), ("accuracy_norm", "acc_norm")):
        cell = evaluation.cell("choice", metric, "en", of_mask)
        assert cell is not None
        assert cell.level is not None
        assert cell.level.mean == sum(sample[of_harness] for sample in logged) / len(logged)


@pytest.mark.parametrize("name", JOBS)
def test_generated_texts_equal_our_own_clients(samples: dict, tiny_server: Server, name: str) -> None:
    logged = samples[name]["crane_texts"]
    texts = {sample["doc"]["question"]: sample["resps"][0][0] for sample in logged}
    assert set(texts) == set(PROMPTS)
    with CraneClient(tiny_server.url) as client:
        own = client.generate(PROMPTS, mask=JOBS[name].mask, max_tokens=NEW_TOKENS, temperature=0, stop=STOPS)
    assert [texts[prompt] for prompt in PROMPTS] == [output.text for output in own.outputs]


def test_whole_texts_equal_our_own_clients(tiny: Tiny, tiny_server: Server) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    url = f"{tiny_server.url}/v1/completions?mask=zh"
    tokenizer = {"tokenizer": str(tiny.checkpoint), "tokenizer_backend": "huggingface"}
    harness = LocalCompletionsAPI(base_url=url, model="tiny", max_length=512, **tokenizer)
    asked = [Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0) for text in PROMPTS]
    with CraneClient(tiny_server.url) as client:
        own = [score.logprob for score in client.score_text(PROMPTS, mask="zh").scores]
    assert harness.loglikelihood_rolling(asked, disable_tqdm=True) == pytest.approx(own, abs=1e-3)


def test_the_servers_tokenizer_serves_the_harness(
    samples: dict, tiny: Tiny, tiny_oracle: Oracle, tiny_server: Server
) -> None:
    mask = tiny.library.resolve("vi")
    assert mask is not None

    def encoded(text: str) -> list[int]:
        return tiny_oracle.tokenizer(text, add_special_tokens=False)["input_ids"]

    for sample in samples[REMOTE]["crane_choices"]:
        for number, (response,) in enumerate(sample["resps"]):
            context, continuation = sample["arguments"][number]
            # White space at the end of a context belongs to what follows; before an empty one stands the end token,
            # since the harness takes the start token, 0, for none.
            start = encoded(context.rstrip()) or [tiny_oracle.tokenizer.eos_token_id]
            whole = (start if not context else []) + encoded(context + continuation)
            expected = tiny_oracle.logprobs(whole, mask.mask)[len(start) - 1 :]
            assert float(response[0]) == pytest.approx(sum(expected), abs=1e-3)
    texts = {sample["doc"]["question"]: sample["resps"][0][0] for sample in samples[REMOTE]["crane_texts"]}
    body = {"model": "tiny:vi", "temperature": 0, "max_tokens": NEW_TOKENS, "stop": [*STOPS, "</s>"]}
    for prompt in PROMPTS:
        answer = httpx.post(f"{tiny_server.url}/v1/completions", json={**body, "prompt": encoded(prompt)}, timeout=60)
        assert texts[prompt] == answer.json()["choices"][0]["text"]


def test_the_harness_sees_where_the_servers_tokenizer_can_be_asked(tiny_server: Server) -> None:
    from lm_eval.utils import check_remote_tokenizer_support

    assert check_remote_tokenizer_support(f"{tiny_server.url}/v1/completions", max_retries=1)
    # It puts /tokenizer_info behind the query.
    assert not check_remote_tokenizer_support(f"{tiny_server.url}/v1/completions?mask=vi", max_retries=1)


def test_masks_differ_and_both_ways_to_name_one_agree(samples: dict) -> None:
    def numbers(name: str) -> list[Any]:
        logged = sorted(samples[name]["crane_choices"], key=lambda sample: sample["doc_id"])
        return [[round(float(response[0]), 3) for (response,) in sample["resps"]] for sample in logged]

    assert numbers("no mask") == numbers("?mask=none")
    different = [numbers(name) for name in ("no mask", "?mask=zh", "?mask=vi, in batches")]
    assert all(first != second for first, second in zip(different, different[1:] + different[:1], strict=True))
    for by_query, by_name in zip(numbers("?mask=zh"), numbers("model tiny:zh"), strict=True):
        assert by_query == pytest.approx(by_name, abs=1e-2)
