"""Masks over the Hub: pushed with a card, pulled, fetched before an engine starts; against a server that stands in."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import save
from typer.testing import CliRunner, Result

from clients.evaluation import Cell, Evaluation, PlannedMask, TaskInfo, Throughput
from clients.task import Metric
from crane_serve.cli import app
from crane_serve.common.hub_name import HubName
from crane_serve.common.masks import (
    Fingerprint,
    HubMasksError,
    MaskInfo,
    MaskLibrary,
    NeuronMask,
    mask_directory,
    read_mask,
    write_mask,
)
from crane_serve.common.masks.card import front_matter, mask_card
from crane_serve.common.masks.hub import fetch_masks, is_pinned
from crane_serve.common.masks.positions import Positions
from crane_serve.common.numbers.bootstrap import Estimate
from crane_serve.common.numbers.langspec import Form
from crane_serve.service import process
from crane_serve.service.settings import SettingError, load_settings
from relevance.validation.result import MaskEffect, Texts, Validation, ValidationPlan
from tests.engines import random_masks
from tests.hub import Hub, cached

NAME = "some/masks"
ENGLISH, VIETNAMESE, CHINESE = FILES = [f"attnlrp-{language}.safetensors" for language in ("en", "vi", "zh")]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with Hub() as running:
        running.use_here(monkeypatch, tmp_path / "cache")
        yield running


@pytest.fixture
def masks(checkpoint: Path, tmp_path: Path) -> Path:
    random_masks(checkpoint, tmp_path / "masks", share=0.25)
    return tmp_path / "masks"


def crane(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def pushed(*arguments: object) -> str:
    """What `crane masks push` prints: the repository at the commit."""
    result = crane("masks", "push", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()[-1]


def digests(directory: Path) -> dict[str, str]:
    return {path.name: read_mask(path).mask.digest for path in directory.glob("*.safetensors")}


def said(result: Result) -> str:
    assert result.exit_code == 1, result.output
    return " ".join(result.stderr.split())


def test_masks_that_are_pushed_and_pulled_are_the_same(hub: Hub, masks: Path, tmp_path: Path) -> None:
    first = pushed(masks, f"hf:{NAME}")
    assert first == f"hf:{NAME}@{hub.repositories[NAME][-1][0]}"
    assert sorted(hub.files(NAME)) == [".gitattributes", "README.md", *FILES]
    result = crane("masks", "pull", f"hf:{NAME}", "--to", tmp_path / "here")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [*(str(tmp_path / "here" / name) for name in FILES), first]
    assert digests(tmp_path / "here") == digests(masks)
    assert [read_mask(tmp_path / "here" / name).info for name in FILES] == [
        read_mask(masks / name).info for name in FILES
    ]


def test_a_repository_is_private_if_it_is_to_be(hub: Hub, masks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed(masks / ENGLISH, f"hf:{NAME}", "--private")
    assert hub.private == {NAME}
    pushed(masks / ENGLISH, "hf:some/others")
    assert hub.private == {NAME}
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "some/masks is not on the Hub, or not open to this account" in said(crane("masks", "list", f"hf:{NAME}"))


def test_a_token_is_sent_and_never_said(
    hub: Hub, masks: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert pushed(masks, f"hf:{NAME}")
    monkeypatch.setenv("HF_TOKEN", "hf_another_secret")
    result = crane("masks", "push", masks, "hf:some/others")
    assert "hf:some/others could not be pushed to: " in said(result)
    assert "Invalid username or password" in said(result)
    assert "secret" not in result.output + caplog.text
    assert hub.token not in result.output + caplog.text
    assert list(hub.repositories) == [NAME]


def test_masks_that_are_there_stay_and_stand_in_the_card(hub: Hub, masks: Path) -> None:
    pushed(masks / ENGLISH, f"hf:{NAME}", "--licence", "apache-2.0", "--positions", "prompt[-4:]")
    before = hub.files(NAME)[ENGLISH]
    pushed(masks / CHINESE, f"hf:{NAME}")
    assert hub.files(NAME)[ENGLISH] == before
    card = hub.files(NAME)["README.md"].decode()
    assert front_matter(card)["license"] == "apache-2.0", "what the first push said"
    assert "Meant for the tokens prompt[-4:]." in card
    for name in (ENGLISH, CHINESE):
        assert read_mask(masks / name).mask.digest[:16] in card
    assert read_mask(masks / VIETNAMESE).mask.digest[:16] not in card


def test_pushing_the_same_again_replaces_masks(hub: Hub, masks: Path, checkpoint: Path) -> None:
    pushed(masks, f"hf:{NAME}")
    random_masks(checkpoint, masks, share=0.5)
    again = pushed(masks, f"hf:{NAME}")
    assert digests(fetch_masks(HubName.parse(again))) == digests(masks)


@pytest.mark.parametrize("file", ["README.md", ENGLISH])
def test_what_is_not_ours_is_overwritten_by_force_only(hub: Hub, masks: Path, file: str) -> None:
    hub.put(NAME, {file: b"of somebody", "notes.txt": b"stays"})
    refused = crane("masks", "push", masks, f"hf:{NAME}")
    assert f"hf:{NAME} has {file}, not written by `crane masks push`; --force overwrites it" in said(refused)
    assert hub.files(NAME)[file] == b"of somebody"
    pushed(masks, f"hf:{NAME}", "--force")
    assert sorted(hub.files(NAME)) == ["README.md", *FILES, "notes.txt"]
    assert hub.files(NAME)[file] != b"of somebody"


def test_no_mask_is_pushed_beside_weights(hub: Hub, masks: Path) -> None:
    hub.put(NAME, {"model.safetensors": save({"a": torch.ones(2)})})
    for flags in ((), ("--force",)):
        assert "holds model.safetensors, which is no mask file" in said(
            crane("masks", "push", masks, f"hf:{NAME}", *flags)
        )
    assert list(hub.files(NAME)) == ["model.safetensors"]


def test_a_repository_has_masks_of_one_model(hub: Hub, masks: Path) -> None:
    fingerprint = read_mask(masks / ENGLISH).info.fingerprint.model_copy(update={"weights_digest": "f" * 64})
    mask = NeuronMask.switching_off([[0]] * fingerprint.layers, fingerprint.intermediate_sizes)
    other = write_mask(masks.parent / "other", "a", mask, MaskInfo(language="a", method="b", fingerprint=fingerprint))
    pushed(masks, f"hf:{NAME}")
    assert "are of two models" in said(crane("masks", "push", other, f"hf:{NAME}"))
    assert "are of two models" in said(crane("masks", "push", other, masks, "hf:some/others"))
    assert list(hub.repositories) == [NAME]


def test_a_commit_in_between_is_noticed(hub: Hub, masks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed(masks / ENGLISH, f"hf:{NAME}")
    batch = Hub._batch

    def somebody_commits(self: Hub, wanted: dict) -> object:
        self.put(NAME, {**self.files(NAME), "notes.txt": b"new"})
        return batch(self, wanted)

    monkeypatch.setattr(Hub, "_batch", somebody_commits)
    assert "A commit has happened since" in said(crane("masks", "push", masks / CHINESE, f"hf:{NAME}"))
    assert CHINESE not in hub.files(NAME)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("masks", "some/masks"), "'some/masks' names no repository; expected hf:OWNER/NAME (maybe with @REVISION)"),
        (("masks", "hf:some/masks@main"), "hf:some/masks@main: masks are pushed to the default branch"),
        (("masks", "masks/attnlrp-en.safetensors", "hf:some/masks"), "two masks are called 'attnlrp-en'"),
        (("masks/nothing.safetensors", "hf:some/masks"), "nothing.safetensors: not a readable mask file"),
        (
            ("masks", "hf:some/masks", "--positions", "first"),
            "--positions 'first': expected 'all', 'prompt'",
        ),
        (("masks", "hf:some/masks", "--revision", "v1"), "--revision is of --base-model, which is not given"),
        (("masks", "hf:some/masks", "--base-model", "masks"), "masks is a directory; expected a hub id"),
        (("masks", "hf:some/masks", "--validation", "nowhere"), "is not the result of a validation"),
    ],
)
def test_what_cannot_be_pushed(
    hub: Hub, masks: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(masks.parent)
    assert message in said(crane("masks", "push", *arguments))
    assert not hub.repositories


class TestCard:
    """What the card says, read as the Hub reads it."""

    def test_it_describes_masks_and_model(self, hub: Hub, masks: Path) -> None:
        pushed(masks, f"hf:{NAME}", "--licence", "mit", "--positions", "generated")
        card = hub.files(NAME)["README.md"].decode()
        front = yaml.safe_load(card.split("---\n")[1])
        stored = read_mask(masks / ENGLISH)
        of = stored.info.fingerprint
        assert front == {
            "license": "mit",
            "library_name": "crane-serve",
            "fingerprint": {"config": of.config_digest, "weights": of.weights_digest},
            "positions": "generated",
            "tags": ["crane-serve", "neuron-mask", "attnlrp"],
        }
        row = next(line for line in card.splitlines() if line.startswith("| attnlrp-en |"))
        assert f"| {stored.mask.neurons:,} | off |" in row
        assert of.config_digest in card
        assert of.weights_digest in card
        assert "Meant for generated tokens only." in card
        assert f"crane serve MODEL --masks hf:{NAME}" in card
        assert "mask=attnlrp-en&positions=generated" in card
        assert f'read_mask(mask_directory("hf:{NAME}") / "attnlrp-en.safetensors")' in card

    def test_the_model_is_named_if_it_is_the_masks_own(
        self, hub: Hub, masks: Path, checkpoint: Path, tmp_path: Path
    ) -> None:
        random_masks(checkpoint, masks, share=0.25)
        commits = cached(tmp_path / "cache", "some/model", {"main": checkpoint})
        arguments = ("--base-model", "some/model", "--revision", commits["main"])
        hub.repositories["some/model"] = [(commits["main"], {})]  # its files are in the cache
        pushed(masks, f"hf:{NAME}", *arguments)
        card = front_matter(hub.files(NAME)["README.md"].decode())
        assert (card["base_model"], card["base_model_revision"]) == ("some/model", commits["main"])
        pushed(masks, f"hf:{NAME}")
        again = front_matter(hub.files(NAME)["README.md"].decode())
        assert again == card, "what the first push said"
        info = read_mask(masks / ENGLISH).info
        other = info.model_copy(
            update={"fingerprint": info.fingerprint.model_copy(update={"weights_digest": "0" * 64})}
        )
        write_mask(tmp_path / "foreign", "foreign", read_mask(masks / ENGLISH).mask, other)
        refused = crane("masks", "push", tmp_path / "foreign", "hf:some/others", *arguments)
        assert "mask 'foreign' was made for another model" in said(refused)
        assert "some/others" not in hub.repositories
        for file in FILES:
            write_mask(tmp_path / "others", file.removesuffix(".safetensors"), read_mask(masks / file).mask, other)
        pushed(tmp_path / "others", f"hf:{NAME}")
        assert "base_model" not in front_matter(hub.files(NAME)["README.md"].decode()), "all masks are of another now"

    @pytest.mark.parametrize("text", ["", "# no front matter", "---\n: [\n---\n", "---\n- a\n---\n"])
    def test_front_matter_that_is_none_is_empty(self, text: str) -> None:
        assert front_matter(text) == {}

    def test_what_masks_do_is_said_in_short(self, checkpoint: Path, masks: Path) -> None:
        stored = read_mask(masks / ENGLISH)
        sizes = stored.info.fingerprint.intermediate_sizes
        scales = torch.ones(len(sizes), max(sizes))
        scales[0, :3], scales[1, 0] = 0.5, 2.0
        offset = torch.zeros_like(scales)
        offset[1, 1] = 3.0
        mask = NeuronMask(scales, sizes, offset=offset)
        card = mask_card(NAME, [type(stored)("damped", mask, stored.info.model_copy(update={"budget": 0.01}))])
        row = next(line for line in card.splitlines() if line.startswith("| damped |"))
        assert "| 1 % | 5 | times 0.5 to 2, values added | 0 (3), 1 (2) |" in row
        gone = torch.where(offset != 0, 0.0, 1.0)
        info = stored.info.model_copy(update={"parameters": {"intervention": "mean:zh", "strength": 0.5}})
        card = mask_card(NAME, [type(stored)("mean", NeuronMask(gone, sizes, offset=offset), info)])
        assert "| replaced by other values, mean:zh with strength 0.5 | 1 (1) |" in card
        assert "all tokens of a request" in card
        assert "`applied` masks all tokens" not in card
        assert "`applied` masks all tokens" in mask_card(NAME, [stored], positions=Positions.PROMPT)
        window = mask_card(NAME, [stored], positions=Positions.parse("prompt[-4:]+generated"))
        assert "Meant for the tokens prompt[-4:]+generated." in window
        assert "&positions=prompt%5B-4%3A%5D%2Bgenerated'" in window

    def test_figures_of_a_validation_and_of_an_evaluation(self, hub: Hub, masks: Path, tmp_path: Path) -> None:
        stored = read_mask(masks / CHINESE)
        changes = {"zh": Estimate(mean=2.5, low=2.0, high=3.0), "en": Estimate(mean=-0.125, low=None, high=None)}
        effect = MaskEffect(
            method="attnlrp",
            language="zh",
            rule="budget",
            seed=None,
            budget=0.25,
            neurons=stored.mask.neurons,
            digest=stored.mask.digest,
            changes=changes,
            collateral=None,
            f1=dict.fromkeys(Form, 0.0),
        )
        text = Texts(corpus_digest="", split="test", documents={"zh": 20, "en": 20}, tokens={}, nats_per_token={})
        Validation(
            fingerprint=stored.info.fingerprint,
            languages=("en", "zh"),
            dtype="float32",
            plan=ValidationPlan(methods=("attnlrp",)),
            relevance_digest="",
            texts={"test": text},
            effects=[effect],
            unreached=[],
            empty=[],
            overlap_budget=0.01,
            overlaps=[],
            stability={},
            layers={},
        ).save(tmp_path)
        metric = Metric(name="right", title="Right", unit="share", higher_is_better=True)
        cell = Cell(task="quiz", metric="right", language="zh", mask="zh", items=4,
                    change=Estimate(mean=-0.75, low=-1.0, high=-0.5))  # fmt: skip
        task = TaskInfo(name="quiz", kind="choice", settings={}, metrics=(metric,), languages=("zh",),
                        masks=("none", "zh", "vi"), items={"zh": 4}, digests={})  # fmt: skip
        planned = {"none": PlannedMask(name="none"), "zh": PlannedMask(name="zh", digest=stored.mask.digest),
                   "vi": PlannedMask(name="vi", digest="0" * 64)}  # fmt: skip
        evaluation = Evaluation(name="e", plan={}, model={}, server_version=None, languages=("zh",), masks=planned,
                                tasks=(task,), cells=(cell,),
                                throughput=Throughput(answers=0, tokens=0, seconds=0, sessions=0))  # fmt: skip
        evaluation.write(tmp_path)
        figures = ("--validation", tmp_path, "--evaluation", tmp_path)
        pushed(masks, f"hf:{NAME}", *figures)
        lines = hub.files(NAME)["README.md"].decode().splitlines()
        assert "| attnlrp-zh | -0.12 | **+2.50 [+2.00, +3.00]** |" in lines
        (row,) = [line for line in lines if line.startswith("| zh |")]
        assert "-0.75" in row
        assert not [line for line in lines if line.startswith("| vi |")], "a mask that is not pushed"
        refused = crane("masks", "push", masks / ENGLISH, "hf:some/others", *figures)
        assert f"{tmp_path} has no figures of attnlrp-en" in said(refused)
        assert "some/others" not in hub.repositories


class TestFetch:
    """What is fetched, and when nothing can be."""

    def test_only_masks_are_fetched_and_each_once(self, hub: Hub, masks: Path) -> None:
        pushed(masks, f"hf:{NAME}")
        beside = {"pytorch_model.bin": b"pickle", "code.py": b"import os", "below/model.safetensors": b"weights"}
        commit = hub.put(NAME, {**hub.files(NAME), **beside, ".hidden.safetensors": b"hidden"})
        directory = mask_directory(f"hf:{NAME}")
        assert directory.name == commit
        assert sorted(hub.whole()) == FILES
        assert sorted(path.name for path in directory.rglob("*")) == FILES
        asked = len(hub.asked)
        assert mask_directory(f"hf:{NAME}") == directory
        assert sorted(hub.whole()) == FILES
        assert not [path for _, path, _ in hub.asked[asked:] if "/resolve/" in path]

    @pytest.mark.parametrize("content", [save({"a": torch.ones(2)}), b"not even safetensors"])
    def test_what_is_no_mask_is_refused_before_it_is_fetched(self, hub: Hub, masks: Path, content: bytes) -> None:
        pushed(masks, f"hf:{NAME}")
        hub.put(NAME, {**hub.files(NAME), "model.safetensors": content})
        with pytest.raises(HubMasksError, match=f"hf:{NAME} holds model.safetensors, which is no mask file"):
            mask_directory(f"hf:{NAME}")
        assert hub.whole() == []

    def test_a_commit_stays_what_it_was(self, hub: Hub, masks: Path, checkpoint: Path) -> None:
        first, before = pushed(masks, f"hf:{NAME}"), digests(masks)
        random_masks(checkpoint, masks, share=0.5)
        second = pushed(masks, f"hf:{NAME}")
        assert digests(mask_directory(first)) == before
        assert digests(mask_directory(f"hf:{NAME}")) == digests(mask_directory(second)) == digests(masks) != before

    def test_without_the_hub_the_cache_is_used(self, hub: Hub, masks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import HfApi, constants

        first = pushed(masks, f"hf:{NAME}")
        directory = mask_directory(f"hf:{NAME}")

        def fail(*_: object, **__: object) -> None:
            raise OfflineModeIsEnabled("no network here")

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(HfApi, "model_info", fail)
        assert mask_directory(f"hf:{NAME}") == mask_directory(first) == directory
        with pytest.raises(HubMasksError, match=r"hf:some/others could not be fetched, .* no network here"):
            mask_directory("hf:some/others")
        (directory / ENGLISH).unlink()
        with pytest.raises(HubMasksError, match="the Hub's cache does not have all of it"):
            mask_directory(f"hf:{NAME}")

    def test_without_the_hub_a_commit_is_whole_or_refused(
        self, hub: Hub, masks: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A push fetches the masks that stay, and the card, into the same cache."""
        from huggingface_hub import HfApi, constants

        first = pushed(masks, f"hf:{NAME}")
        pushed(masks / ENGLISH, f"hf:{NAME}")

        def fail(*_: object, **__: object) -> None:
            raise OfflineModeIsEnabled("no network here")

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(HfApi, "model_info", fail)
        with pytest.raises(HubMasksError, match="the Hub's cache does not have all of it"):
            mask_directory(first)

    def test_a_hub_that_is_not_there(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(HubMasksError, match=f"hf:{NAME} could not be fetched, and the Hub's cache does not"):
            mask_directory(f"hf:{NAME}")

    def test_what_is_not_on_the_hub(self, hub: Hub, masks: Path) -> None:
        hub.put(NAME, {"README.md": b"nothing else"})
        for name, message in (
            ("hf:some/nothing", "some/nothing is not on the Hub, or not open to this account"),
            (f"hf:{NAME}@v2", f"{NAME} on the Hub has no revision 'v2'"),
            (f"hf:{NAME}", f"hf:{NAME} holds no mask files"),
        ):
            with pytest.raises(HubMasksError, match=message):
                mask_directory(name)

    def test_masks_of_another_model_are_listed_as_invalid(self, hub: Hub, masks: Path) -> None:
        pushed(masks, f"hf:{NAME}")
        of = read_mask(masks / ENGLISH).info.fingerprint
        library = MaskLibrary.load(mask_directory(f"hf:{NAME}"), of)
        assert (len(library.masks), library.invalid) == (3, {})
        foreign = Fingerprint.model_validate({**of.model_dump(), "weights_digest": "0" * 64})
        library = MaskLibrary.load(mask_directory(f"hf:{NAME}"), foreign)
        assert library.masks == {}
        assert all("was made for another model" in reason for reason in library.invalid.values())
        assert len(library.invalid) == 3

    def test_a_damaged_mask_is_listed_as_invalid(self, hub: Hub, masks: Path, tmp_path: Path) -> None:
        pushed(masks, f"hf:{NAME}")
        content = hub.files(NAME)[ENGLISH]
        hub.put(NAME, {**hub.files(NAME), ENGLISH: content[:-4] + b"\0\0\0@"})
        directory = mask_directory(f"hf:{NAME}")
        library = MaskLibrary.load(directory, read_mask(masks / CHINESE).info.fingerprint)
        assert list(library.invalid) == ["attnlrp-en"]
        assert "attnlrp-en" in said(crane("masks", "pull", f"hf:{NAME}", "--to", tmp_path / "here"))
        assert not (tmp_path / "here").exists()


def test_pulling_replaces_other_masks_by_force_only(hub: Hub, masks: Path, checkpoint: Path, tmp_path: Path) -> None:
    pushed(masks, f"hf:{NAME}")
    before = digests(masks)
    assert crane("masks", "pull", f"hf:{NAME}", "--to", masks).exit_code == 0, "the same are no other masks"
    random_masks(checkpoint, masks, share=0.5)
    message = said(crane("masks", "pull", f"hf:{NAME}", "--to", masks))
    assert f"{masks / ENGLISH} exists and is another mask than that of hf:{NAME}; --force replaces it" in message
    assert digests(masks) != before
    assert crane("masks", "pull", f"hf:{NAME}", "--to", masks, "--force").exit_code == 0
    assert digests(masks) == before


def test_commands_read_masks_from_the_hub(hub: Hub, masks: Path, checkpoint: Path, tmp_path: Path) -> None:
    pushed(masks, f"hf:{NAME}")
    for name in (f"hf:{NAME}", masks):
        listed = crane("masks", "list", name)
        assert all(read_mask(masks / file).mask.digest[:12] in listed.stdout for file in FILES)
        shown = crane("masks", "show", name, "attnlrp-en")
        assert json.loads(shown.stdout)["digest"] == read_mask(masks / ENGLISH).mask.digest
    moved = crane("masks", "transfer", f"hf:{NAME}", "--to", checkpoint, "--out", tmp_path / "moved")
    assert moved.exit_code == 0, moved.output
    assert digests(tmp_path / "moved") == digests(masks)


class TestServing:
    """`crane serve --masks hf:...`, up to the engine."""

    @pytest.fixture
    def directories(self, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        """Those that engines are configured with; no engine is."""
        found: list[Path] = []

        def configure_engine(model: Path, masks: Path, *_: object, **switches: object) -> None:
            found.append(masks)
            raise ValueError("no engine in this test")

        monkeypatch.setattr(process, "configure_engine", configure_engine)
        return found

    def test_masks_are_fetched_before_the_engine_starts(
        self, hub: Hub, masks: Path, checkpoint: Path, directories: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = pushed(masks, f"hf:{NAME}")
        for name in (f"hf:{NAME}", first):
            assert "no engine in this test" in said(crane("serve", checkpoint, "--masks", name))
        monkeypatch.setenv("CRANE_MASKS", f"hf:{NAME}")
        assert "no engine in this test" in said(crane("serve", checkpoint))
        assert [directory.name for directory in directories] == [first.rpartition("@")[2]] * 3
        assert all(digests(directory) == digests(masks) for directory in directories)

    def test_masks_that_are_not_there_end_it(self, hub: Hub, checkpoint: Path, directories: list[Path]) -> None:
        assert "some/nothing is not on the Hub" in said(crane("serve", checkpoint, "--masks", "hf:some/nothing"))
        assert directories == []

    def test_settings_ask_the_hub_for_nothing(self, hub: Hub, checkpoint: Path) -> None:
        assert load_settings({"model": str(checkpoint), "masks": "hf:a/b@v1"}).settings.masks == "hf:a/b@v1"
        with pytest.raises(SettingError, match=r"masks: 'hf:a' names no repository; expected hf:OWNER/NAME \(maybe"):
            load_settings({"model": str(checkpoint), "masks": "hf:a"})
        assert hub.asked == []


@pytest.mark.parametrize(
    "name", ["hf:", "hf:a", "hf:a/b/c", "hf:a/b@", "hf:../b", "hf:a/..", "hf:a/b@../c", "a/b", "hf:a/b c"]
)
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="names no repository"):
        HubName.parse(name)


@pytest.mark.parametrize("name", ["hf:a/b", "hf:a-1/b.c_d@v1.0", "hf:a/b@refs/pr/1"])
def test_names_are_written_as_they_are_read(name: str) -> None:
    assert str(HubName.parse(name)) == name


def test_a_commit_of_the_hub_is_pinned_and_a_copy_is_not(hub: Hub, masks: Path, tmp_path: Path) -> None:
    pushed(masks, f"hf:{NAME}")
    directory = mask_directory(f"hf:{NAME}")
    assert is_pinned(directory)
    (tmp_path / "link").symlink_to(directory)
    assert is_pinned(tmp_path / "link")
    shutil.copytree(directory, tmp_path / "copy")
    assert not is_pinned(tmp_path / "copy")
    assert not is_pinned(masks)
