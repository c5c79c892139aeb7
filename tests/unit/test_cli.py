"""The `crane` command: what it prints, and that an error of the user's is one line and exit code 1."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import crane_serve
from crane_serve.cli import app
from crane_serve.common.masks import Fingerprint, MaskInfo, NeuronMask, read_mask, write_mask
from crane_serve.common.models import fetch as fetching
from crane_serve.service import process
from crane_serve.service.settings import ServeSettings
from tests.tiny import LAYERS


def crane(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, [str(argument) for argument in arguments])


def assert_fails(result: Result, message: str) -> None:
    """Exit code 1, nothing of a traceback, and one line on stderr that says what."""
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.fixture
def masks(tmp_path: Path, fingerprint: Fingerprint) -> Path:
    for language, neurons in {"en": [[0, 3], []], "zh": [[], [4]]}.items():
        mask = NeuronMask.switching_off(neurons, fingerprint.intermediate_sizes)
        info = MaskInfo(language=language, method="attnlrp", fingerprint=fingerprint, budget=0.125)
        write_mask(tmp_path / "masks", f"attnlrp-{language}", mask, info)
    return tmp_path / "masks"


def test_version() -> None:
    result = crane("--version")
    assert (result.exit_code, result.stdout) == (0, f"{crane_serve.__version__}\n")


@pytest.mark.parametrize("arguments", [(), ("model",), ("masks",)])
def test_without_a_command_there_is_help(arguments: tuple[str, ...]) -> None:
    result = crane(*arguments)
    assert "Usage:" in result.output
    assert "Traceback" not in result.output


def test_fetch_of_an_unknown_model(tmp_path: Path) -> None:
    assert_fails(crane("model", "fetch", "gpt-5", "--to", tmp_path / "model"), "unknown model 'gpt-5'; known models: ")
    assert list(tmp_path.iterdir()) == []


def test_messages_with_brackets_are_shown_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object) -> list[Path]:
        raise fetching.FetchError("needs crane-serve[demo], see [/nowhere] and [bold]this[/bold]")

    monkeypatch.setattr(fetching, "_download", download)
    result = crane("model", "fetch", "smollm2-135m", "--to", tmp_path / "model")
    assert_fails(result, "needs crane-serve[demo], see [/nowhere] and [bold]this[/bold]")


def test_masks_are_listed(masks: Path) -> None:
    result = crane("masks", "list", masks)
    assert result.exit_code == 0
    for name in ("attnlrp-en", "attnlrp-zh"):
        stored = read_mask(masks / f"{name}.safetensors")
        (row,) = (line for line in result.stdout.splitlines() if name in line)
        for cell in (stored.info.language, "attnlrp", "0.125", str(stored.mask.neurons), stored.mask.digest[:12]):
            assert cell in row


def test_listing_goes_on_after_a_broken_file(masks: Path) -> None:
    (masks / "attnlrp-broken.safetensors").write_bytes(b"nothing")
    result = crane("masks", "list", masks)
    assert_fails(result, f"{masks / 'attnlrp-broken.safetensors'}: not a readable mask file")
    assert "attnlrp-en" in result.stdout
    assert "attnlrp-zh" in result.stdout


def test_provenance_is_no_markup(masks: Path, fingerprint: Fingerprint) -> None:
    info = MaskInfo(language="[/x]", method="[red]m", fingerprint=fingerprint)
    write_mask(masks, "odd", NeuronMask.switching_off([[], []], (6, 5)), info)
    result = crane("masks", "list", masks)
    assert result.exit_code == 0
    assert "[/x]" in result.stdout
    assert "[red]m" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("attnlrp-zh",), ["attnlrp-zh"]),
        (("attnlrp-zh", "attnlrp-en"), ["attnlrp-zh", "attnlrp-en"]),
        ((), ["attnlrp-en", "attnlrp-zh"]),
    ],
)
def test_masks_are_shown_as_json(masks: Path, arguments: tuple[str, ...], names: list[str]) -> None:
    result = crane("masks", "show", masks, *arguments)
    assert result.exit_code == 0
    shown = [json.loads(line) for line in result.stdout.splitlines()]
    assert [mask["name"] for mask in shown] == names
    for mask in shown:
        stored = read_mask(masks / f"{mask['name']}.safetensors")
        assert mask["digest"] == stored.mask.digest
        assert mask["neurons"] == stored.mask.neuron_sets()
        assert mask["fingerprint"] == stored.info.fingerprint.model_dump(mode="json")


def test_one_file_is_shown(masks: Path) -> None:
    result = crane("masks", "show", masks / "attnlrp-en.safetensors")
    shown = json.loads(result.stdout)
    assert shown["neurons"] == [[0, 3], []]
    assert not {"scales", "offsets"} & shown.keys()


def test_what_becomes_of_neurons_is_shown(masks: Path) -> None:
    stored = read_mask(masks / "attnlrp-en.safetensors")
    scales, sizes = stored.mask.intermediate.clone(), stored.mask.intermediate_sizes
    offset = torch.zeros_like(scales)
    scales[0, 3], offset[1, 2] = 0.5, 1.5
    mask = NeuronMask(scales, sizes, offset=offset)
    write_mask(masks, "other", mask, stored.info)
    shown = json.loads(crane("masks", "show", masks / "other.safetensors").stdout)
    assert shown["neurons"] == [[0, 3], [2]]
    assert shown["scales"] == [[0.0, 0.5], [1.0]]
    assert shown["offsets"] == [[0.0, 0.0], [1.5]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list", "missing"), "missing is not a directory of mask files"),
        (("show", "missing"), "missing: not a readable mask file"),
        (("show", "missing.safetensors"), "missing.safetensors: not a readable mask file"),
        (("show", "masks", "fr"), "masks/fr.safetensors: not a readable mask file"),
        (("show", "masks", "../masks/attnlrp-en"), "mask name '../masks/attnlrp-en' is not allowed"),
        (("show", "empty"), "empty holds no mask files"),
    ],
)
def test_masks_that_are_not_there(
    masks: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    (masks.parent / "empty").mkdir()
    monkeypatch.chdir(masks.parent)
    assert_fails(crane("masks", *arguments), message)


class TestImportLape:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        layers = [torch.tensor([layer, 7]) for layer in range(LAYERS)]
        torch.save([layers, layers[::-1]], tmp_path / "lape.pth")
        return tmp_path / "lape.pth"

    def run(self, file: Path, languages: str, model: Path) -> Result:
        out = file.parent / "masks"
        return crane("masks", "import-lape", file, "--languages", languages, "--model", model, "--out", out)

    def test_writes_masks_and_says_where(self, file: Path, checkpoint: Path) -> None:
        result = self.run(file, "en, zh", checkpoint)
        assert result.exit_code == 0
        paths = [Path(line) for line in result.stdout.splitlines()]
        assert [path.name for path in paths] == ["lape-en.safetensors", "lape-zh.safetensors"]
        stored = read_mask(paths[0])
        assert stored.mask.neuron_sets() == [[0, 7], [1, 7], [2, 7]]
        assert stored.info.fingerprint == Fingerprint.of(checkpoint)

    @pytest.mark.parametrize(
        ("languages", "message"),
        [
            ("en", "holds 2 languages, but 1 labels were given"),
            ("en,en", "labels en, en are not all different"),
            ("en,Z H", "mask name 'Z H' is not allowed"),
        ],
    )
    def test_refuses_languages(self, file: Path, checkpoint: Path, languages: str, message: str) -> None:
        assert_fails(self.run(file, languages, checkpoint), message)
        assert not (file.parent / "masks").exists()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"en": 1}, "holds the languages en; expected the labels en, zh"),
            ([[torch.tensor([9999])] * LAYERS] * 2, "en: layer 0: neuron 9999 is out of range"),
        ],
    )
    def test_refuses_content(self, file: Path, checkpoint: Path, content: Any, message: str) -> None:
        torch.save(content, file)
        assert_fails(self.run(file, "en,zh", checkpoint), message)
        assert not (file.parent / "masks").exists()

    def test_refuses_a_missing_model(self, file: Path) -> None:
        assert_fails(self.run(file, "en,zh", file.parent / "missing"), "missing does not exist; expected a checkpoint")


class TestServe:
    @pytest.fixture(autouse=True)
    def no_server(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(*_: object, **__: object) -> None:
            raise AssertionError("a server was started")

        monkeypatch.setattr(process, "run", run)

    def test_a_missing_model(self, masks: Path) -> None:
        result = crane("serve", masks.parent / "missing", "--masks", masks)
        assert_fails(result, "missing does not exist; expected a checkpoint directory or a hub id")

    def test_a_directory_without_a_model(self, masks: Path) -> None:
        assert_fails(crane("serve", masks, "--masks", masks), f"{masks} is a directory without config.json")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--masks", "missing"), "'missing' does not exist"),
            ((), "--masks"),
            (("--masks", ".", "--port", "70000"), "Invalid value for '--port'"),
        ],
    )
    def test_wrong_usage(self, checkpoint: Path, options: tuple[str, ...], message: str) -> None:
        result = crane("serve", checkpoint, *options)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.replace("│", " ").split())

    def test_options_and_engine_flags_reach_the_server(
        self, masks: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        served: list[ServeSettings] = []
        monkeypatch.setattr(process, "serve", lambda settings: served.append(settings) or 3)
        monkeypatch.setenv("CRANE_HOST", "0.0.0.0")
        flags = ("--dtype", "float32", "--enforce-eager")
        result = crane("serve", checkpoint, "--masks", masks, "--default-method", "lape", "--port", "9000", *flags)
        assert result.exit_code == 3, result.output  # the server's own
        (settings,) = served
        assert (settings.model, settings.masks) == (str(checkpoint), str(masks))
        assert (settings.default_method, settings.host, settings.port) == ("lape", "0.0.0.0", 9000)
        assert settings.engine_flags == flags
