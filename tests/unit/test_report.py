"""The picture, the page and the sentences made from a matrix of planted effects."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from clients.matrix import Failure, Matrix
from clients.plan import Plan, PlannedMask, text_digest
from clients.report import FILES, cell_text, rows_by_method, sentence, write_all
from clients.results import ItemResult
from crane_serve.statistics import Estimate
from relevance.corpus import Corpus, Document

LANGUAGES = ("en", "vi", "zh")
EFFECTS = {  # nats per token, per language of LANGUAGES
    "attnlrp-en": (0.4, 0.5, 0.45),
    "attnlrp-zh": (0.15, 0.3, 3.1),
    "random-zh": (0.01, -0.02, 0.0),
    "attnlrp-vi": (-0.1, 14.2, -0.3),
    "imported": (0.2, 0.2, 0.2),
}


def planned(name: str) -> PlannedMask:
    method, _, language = name.partition("-")
    if not language:
        return PlannedMask(name=name, digest=f"{name:x<64}", neurons=50)
    return PlannedMask(name=name, digest=f"{name:x<64}", neurons=1234, language=language, method=method, budget=0.01)


def matrix_of(
    effects: Mapping[str, tuple[float, ...]], documents: int = 30, failed: tuple[Failure, ...] = ()
) -> Matrix:
    generator = np.random.default_rng(0)
    corpus = Corpus({
        language: tuple(Document(f"d{n}", f"{language} {n}") for n in range(documents)) for language in LANGUAGES
    })  # fmt: skip
    plan = Plan(corpus, [planned(name) for name in effects])
    base = {(language, f"d{n}"): float(generator.normal(4, 0.5)) for language in LANGUAGES for n in range(documents)}
    results = {}
    for item in plan.items():
        effect = dict(zip(LANGUAGES, effects.get(item.mask, (0, 0, 0)), strict=True))[item.language]
        nats = base[item.language, item.document] + effect * generator.uniform(0.5, 1.5)
        results[item] = ItemResult(
            mask=item.mask, mask_digest=plan.masks[item.mask].digest, language=item.language, document=item.document,
            text_digest=text_digest(plan.text(item)), logprob=-50 * nats, tokens=50, bytes=200, session=1,
            elapsed_s=12.5,
        )  # fmt: skip
    model = {"name": "models/small", "layers": 18, "sizes": [2048, 2048], "weights_digest": "f" * 64}
    return Matrix.of(plan, results, model=model, failed=failed)


def test_rows_are_grouped_by_method() -> None:
    groups = rows_by_method(matrix_of(EFFECTS, documents=2))
    assert groups == [["attnlrp-en", "attnlrp-zh", "attnlrp-vi"], ["random-zh"], ["imported"]]


def test_files(tmp_path: Path) -> None:
    matrix = matrix_of(EFFECTS)
    write_all(matrix, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)
    picture = (tmp_path / "matrix.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.endswith(b"IEND\xaeB`\x82")
    assert len(picture) > 20_000

    report = (tmp_path / "report.md").read_text()
    for mask in matrix.masks:
        assert f"| `{mask}` |" in report
    change = matrix.delta_nats_per_token["attnlrp-zh"]["zh"]
    assert f"**{cell_text(change)}**" in report
    assert f"{matrix.tokens_per_second:,.0f} tokens per second" in report
    for setting in ("models/small", "2048 x 2", "`ffffffffffffffff`", "4000 resamples", "![Change in nats per token"):
        assert setting in report
    assert "Failed items" not in report


@pytest.mark.parametrize("documents", [1, 2])
def test_few_documents_masks_and_huge_effects(tmp_path: Path, documents: int) -> None:
    write_all(matrix_of({}, documents), tmp_path)
    assert "No mask but `none`" in (tmp_path / "report.md").read_text()
    huge = matrix_of({"attnlrp-en": (900.0, 0.0, 0.0)}, documents)
    write_all(huge, tmp_path)
    assert huge.perplexity["attnlrp-en"]["en"] is None
    assert "beyond range" in (tmp_path / "report.md").read_text()


def test_failures_are_listed_and_markup_in_them_is_harmless(tmp_path: Path) -> None:
    failures = tuple(
        Failure(mask="attnlrp-en", language="en", document=f"a|b{n}", error="two\nlines") for n in range(201)
    )
    write_all(matrix_of({"attnlrp-en": (1.0, 0.1, 0.1)}, 2, failures), tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "**201 items failed**" in report
    assert r"| `attnlrp-en` | en | a\|b0 | two lines |" in report
    assert "... and 1 more" in report


def test_sentences_follow_the_numbers() -> None:
    matrix = matrix_of(EFFECTS)
    assert "times the others' change" in sentence(matrix, "attnlrp-zh")
    assert "does not single out its language" in sentence(matrix, "attnlrp-en")
    assert "the others do not get worse" in sentence(matrix, "attnlrp-vi")
    assert "was made for no language in particular: +0.21" in sentence(matrix, "imported")
    assert matrix.profile("imported").selectivity is None
    null = matrix_of({"random-zh": (0.0, 0.0, -0.2)})
    assert "cannot be told from none or is a gain" in sentence(null, "random-zh")


def test_cells() -> None:
    assert cell_text(None) == "-"
    assert cell_text(Estimate(mean=1.234, low=None, high=None)) == "+1.23"
    assert cell_text(Estimate(mean=-0.5, low=-0.6, high=0.1)) == "-0.50 [-0.60, +0.10]"


def test_the_unmasked_row_is_zero() -> None:
    matrix = matrix_of(EFFECTS, documents=3)
    for change in matrix.delta_nats_per_token["none"].values():
        assert change == Estimate(mean=0.0, low=0.0, high=0.0)
