"""Random checkpoint and corpus directories: `python -m tests.fuzz.directories [--count 100] [--seed 0]`.

`crane relevance` runs on copies of one checkpoint and one corpus, each changed by one or two mutations. It must either
give the very scores of the originals, or end with exit code 1 and one line that begins with "error: ": no traceback,
and no exit 0 with a language, a document or a tensor left out. Exits with 1 and the directories that broke a rule.
"""

import argparse
import csv
import gzip
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from crane_serve.cli import app
from relevance.scores import Scores
from tests.tiny import BEYOND, add_token_beyond, byte_tokenizer, tiny_model

LANGUAGES = ("en", "vi", "zh")
_TEXTS = {
    "en": ["The harbour froze in winter.", "A boat lay in the ice.", "Nobody crossed the river.", "Spring came late."],
    "vi": ["Bến cảng đóng băng mùa đông.", "Con thuyền nằm trong băng.", "Không ai qua sông.", "Xuân đến muộn."],
    "zh": ["港口在冬天结冰。", "一条船困在冰里。", "没有人过河。", "春天来得很晚。"],
}
Mutation = Callable[[Path, random.Random], None]


def write_originals(root: Path) -> None:
    """root/checkpoint: a tiny Llama in several shards whose tokenizer knows a token too many; root/corpus: four
    documents per language."""
    checkpoint, corpus = root / "checkpoint", root / "corpus"
    tiny_model("llama", root / "whole")
    AutoModelForCausalLM.from_pretrained(root / "whole").save_pretrained(checkpoint, max_shard_size="200KB")
    byte_tokenizer().save_pretrained(checkpoint)
    add_token_beyond(checkpoint)
    corpus.mkdir()
    for language, texts in _TEXTS.items():
        lines = [json.dumps({"id": f"d{i}", "text": text}, ensure_ascii=False) for i, text in enumerate(texts)]
        (corpus / f"{language}.jsonl").write_text("\n".join(lines) + "\n")


def shard(directory: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(directory.glob("model-*.safetensors")) or [directory / "none"])


def change_shard(change: Callable[[dict[str, torch.Tensor], str], None]) -> Mutation:
    """A mutation of the tensors of one shard, of which one is drawn."""

    def mutate(directory: Path, draw: random.Random) -> None:
        path = shard(directory, draw)
        tensors = load_file(path)
        change(tensors, draw.choice(sorted(tensors)))
        save_file(tensors, path, {"format": "pt"})

    return mutate


def _drop(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def _rename(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[f"{name}.old"] = tensors.pop(name)


def _prefix(tensors: dict[str, torch.Tensor], name: str) -> None:
    for old in list(tensors):
        tensors[f"base_model.{old}"] = tensors.pop(old)


def _reshape(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][:-1].contiguous()


def _spoil(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = torch.full_like(tensors[name], float("nan"))


def _add(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors["vision_tower.weight"] = torch.zeros(3)


def drop_named_tensor(directory: Path, draw: random.Random) -> None:
    """From the shard and the index alike: nothing but the config says that it is missing."""
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = draw.choice(sorted(content["weight_map"]))
    path = directory / content["weight_map"].pop(name)
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    index.write_text(json.dumps(content))


def change_config(**changes: object) -> Mutation:
    def mutate(directory: Path, draw: random.Random) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return mutate


def remove(pattern: str) -> Mutation:
    def mutate(directory: Path, draw: random.Random) -> None:
        draw.choice(sorted(directory.glob(pattern))).unlink()

    return mutate


def cut(pattern: str) -> Mutation:
    """Cut a file inside its content. Of a file of lines the cut lies inside a line."""

    def mutate(directory: Path, draw: random.Random) -> None:
        path = draw.choice(sorted(directory.glob(pattern)))
        content = path.read_bytes()
        end = draw.randrange(1, len(content) - 2)
        while content[end - 1 : end + 1].strip() != content[end - 1 : end + 1]:
            end -= 1
        path.write_bytes(content[:end])

    return mutate


def add(name: str, content: bytes) -> Mutation:
    def mutate(directory: Path, draw: random.Random) -> None:
        (directory / name).write_bytes(content)

    return mutate


def overwrite(pattern: str, content: bytes) -> Mutation:
    def mutate(directory: Path, draw: random.Random) -> None:
        draw.choice(sorted(directory.glob(pattern))).write_bytes(content)

    return mutate


CHECKPOINT: dict[str, Mutation] = {
    "a shard is missing": remove("model-*.safetensors"),
    "the index is missing": remove("*.index.json"),
    "a shard is cut": cut("model-*.safetensors"),
    "the index is cut": cut("*.index.json"),
    "the config is missing": remove("config.json"),
    "the config is cut": cut("config.json"),
    "the config is a list": overwrite("config.json", b"[]"),
    "the config is empty": overwrite("config.json", b"{}"),
    "the tokenizer is missing": remove("tokenizer.json"),
    "the tokenizer is cut": cut("tokenizer.json"),
    "the tokenizer's config is missing": remove("tokenizer_config.json"),
    "a tensor is missing": change_shard(_drop),
    "a tensor is missing everywhere": drop_named_tensor,
    "a tensor has another name": change_shard(_rename),
    "a shard's names have a prefix": change_shard(_prefix),
    "a tensor has another shape": change_shard(_reshape),
    "a tensor is NaN": change_shard(_spoil),
    "a tensor too many": change_shard(_add),
    "a layer more in the config": change_config(num_hidden_layers=4),
    "another width in the config": change_config(intermediate_size=161),
    "an unknown model type": change_config(model_type="nonsense"),
    "an unknown architecture": change_config(architectures=["NonsenseForCausalLM"]),
    "no architecture": change_config(architectures=None),
    "a quantised model": change_config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}),
    "an unknown quantisation": change_config(quantization_config={"quant_method": "nonsense"}),
    "a number as text": change_config(hidden_size="64"),
    "consolidated weights beside": add("consolidated.safetensors", b"anything"),
    "an adapter beside": add("adapter_model.safetensors", b"anything"),
    "training arguments beside": add("training_args.bin", b"anything"),
    "notes beside": add("README.md", b"# A model"),
}


def lines_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def convert(suffix: str, write: Callable[[Path, list[dict[str, str]]], None]) -> Mutation:
    """The same documents in another format."""

    def mutate(directory: Path, draw: random.Random) -> None:
        path = draw.choice(sorted(directory.glob("*.jsonl")))
        rows = lines_of(path)
        path.unlink()
        write(path.with_suffix(suffix), rows)

    return mutate


def _json_list(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False))


def _gzipped(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))


def _gzip_cut(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode())[:-12])


def _text(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("\n".join(row["text"] for row in rows))


def _separated(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text"], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def _without_column(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("id,sentence\n" + "".join(f'{row["id"]},"{row["text"]}"\n' for row in rows))


def _parquet(path: Path, rows: list[dict[str, str]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _parquet_cut(path: Path, rows: list[dict[str, str]]) -> None:
    _parquet(path, rows)
    path.write_bytes(path.read_bytes()[:-20])


def rename(name: Callable[[str], str]) -> Mutation:
    def mutate(directory: Path, draw: random.Random) -> None:
        path = draw.choice(sorted(directory.glob("*.jsonl")))
        other = directory / name(path.stem)
        other.parent.mkdir(exist_ok=True)
        path.rename(other)

    return mutate


def change_line(change: Callable[[dict[str, object]], object]) -> Mutation:
    """One document of one language becomes what `change` returns."""

    def mutate(directory: Path, draw: random.Random) -> None:
        path = draw.choice(sorted(directory.glob("*.jsonl")))
        rows: list[object] = [dict(row) for row in lines_of(path)]
        place = draw.randrange(len(rows))
        rows[place] = change(rows[place])  # type: ignore[arg-type]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return mutate


def change_bytes(change: Callable[[bytes], bytes]) -> Mutation:
    def mutate(directory: Path, draw: random.Random) -> None:
        path = draw.choice(sorted(directory.glob("*.jsonl")))
        path.write_bytes(change(path.read_bytes()))

    return mutate


def copy_language(suffix: str) -> Mutation:
    """The same language in a second file."""

    def mutate(directory: Path, draw: random.Random) -> None:
        path = draw.choice(sorted(directory.glob("*.jsonl")))
        _text(path.with_suffix(suffix), lines_of(path))

    return mutate


CORPUS: dict[str, Mutation] = {
    "a list of JSON": convert(".json", _json_list),
    "compressed lines": convert(".jsonl.gz", _gzipped),
    "compressed lines, cut": convert(".jsonl.gz", _gzip_cut),
    "plain lines": convert(".txt", _text),
    "comma-separated": convert(".csv", _separated),
    "tab-separated": convert(".tsv", _separated),
    "comma-separated without a text column": convert(".csv", _without_column),
    "parquet": convert(".parquet", _parquet),
    "parquet, cut": convert(".parquet", _parquet_cut),
    "a suffix that nobody reads": rename(lambda language: f"{language}.xlsx"),
    "another compression": rename(lambda language: f"{language}.jsonl.bz2"),
    "a suffix in capitals": rename(lambda language: f"{language}.JSONL"),
    "a language in capitals": rename(lambda language: f"{language.upper()}.jsonl"),
    "lines of JSON that are called text": rename(lambda language: f"{language}.txt"),
    "a directory per language": rename(lambda language: f"{language}/train.jsonl"),
    "no suffix": rename(lambda language: language),
    "a file is cut": cut("*.jsonl"),
    "a file is empty": overwrite("*.jsonl", b""),
    "a file of another encoding": change_bytes(lambda content: content.decode().encode("utf-16")),
    "a byte that is no text": change_bytes(lambda content: content.replace(b". ", b"\xff ", 1) + b"\xff\n"),
    "a byte order mark": change_bytes(lambda content: b"\xef\xbb\xbf" + content),
    "Windows line ends": change_bytes(lambda content: content.replace(b"\n", b"\r\n")),
    "blank lines": change_bytes(lambda content: content.replace(b"\n", b"\n\n")),
    "two files of one language": copy_language(".txt"),
    "a document without text": change_line(lambda row: {"id": row["id"]}),
    "an empty document": change_line(lambda row: {**row, "text": " "}),
    "a number as text": change_line(lambda row: {**row, "text": 3}),
    "an id twice": change_line(lambda row: {**row, "id": "d0"} if row["id"] != "d0" else {**row, "id": "d1"}),
    "a list as document": change_line(lambda row: [row["text"]]),
    "a lone surrogate": change_line(lambda row: {**row, "text": "a\ud800b"}),
    "a token beyond the vocabulary": change_line(lambda row: {**row, "text": f"a {BEYOND} b"}),
    "notes beside": add("README.md", b"# A corpus"),
}


def measure(checkpoint: Path, corpus: Path, out: Path) -> tuple[int, str, str | None]:
    """Run the command: its exit code, what it printed on stderr, and what is wrong with how it ended."""
    command = ["relevance", checkpoint, "--corpus", corpus, "--methods", "magnitude,gradient", "--out", out]
    result = CliRunner(env={"COLUMNS": "400", "NO_COLOR": "1"}).invoke(app, [*map(str, command), "--restart"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return result.exit_code, result.stderr, f"traceback: {type(result.exception).__name__}: {result.exception}"
    if result.exit_code:
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        if len(errors) != 1 or result.stderr.splitlines()[-1] != errors[0]:
            return result.exit_code, result.stderr, "it did not end with one line of error"
    return result.exit_code, result.stderr, None


def difference(scores: Path, original: Path) -> str | None:
    """How the scores differ from those of the originals."""
    mine, theirs = Scores.load(scores), Scores.load(original)
    if mine.info.languages != theirs.info.languages:
        return f"languages {mine.info.languages}"
    if mine.info.documents != theirs.info.documents:
        return f"documents {mine.info.documents}"
    for method, expected in theirs.by_method.items():
        if not torch.equal(mine.by_method[method], expected):
            return f"scores of {method}"
    return None


def run(root: Path, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Measure `count` changed directories: how many ended how, and what broke. The first rounds use every mutation."""
    draw = random.Random(seed)
    write_originals(root)
    original = root / "original.safetensors"
    code, stderr, wrong = measure(root / "checkpoint", root / "corpus", original)
    if code or wrong:
        raise RuntimeError(f"the originals cannot be measured: {wrong} {stderr}")
    singles = [("checkpoint", name) for name in CHECKPOINT] + [("corpus", name) for name in CORPUS]
    draw.shuffle(singles)
    outcomes: Counter[str] = Counter()
    broken = []
    for number in range(count):
        place = root / "changed"
        shutil.rmtree(place, ignore_errors=True)
        for name in ("checkpoint", "corpus"):
            shutil.copytree(root / name, place / name)
        mutations = [singles[number]] if number < len(singles) else draw.sample(singles, 2)
        for kind, name in mutations:
            try:
                (CHECKPOINT if kind == "checkpoint" else CORPUS)[name](place / kind, draw)
            except (OSError, IndexError, KeyError, ValueError):
                continue  # the first mutation took away what the second would change
        out = place / "scores.safetensors"
        code, stderr, wrong = measure(place / "checkpoint", place / "corpus", out)
        if code == 0 and wrong is None:
            other = difference(out, original)
            wrong = None if other is None else f"exit 0 with other {other}"
        outcomes["same scores" if code == 0 else f"exit {code}"] += 1
        if wrong is not None:
            broken.append(f"{number}: {mutations}\n    {wrong}\n    {stderr.strip()[-600:]}")
    return outcomes, broken


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        outcomes, broken = run(Path(root), arguments.count, arguments.seed)
    print("\n".join(broken))
    print(f"{arguments.count} directories, seed {arguments.seed}: {dict(outcomes)}; {len(broken)} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
