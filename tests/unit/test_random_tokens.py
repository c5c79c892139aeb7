"""Random tokens as a language that methods of activations score, and as a contrast."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from crane_serve.cli import app
from crane_serve.common.models.families import decoder_of
from crane_serve.common.models.load import load_tokenizer
from relevance.contrast import ContrastError, find_contrast
from relevance.encoding import Batch, EncodedDocuments
from relevance.methods.magnitude import Magnitude
from relevance.model import load_model
from relevance.model_passes import ModelPasses, units_of
from relevance.random_tokens import random_documents
from relevance.scores import Scores, ScoresError
from relevance.selection import order, select
from relevance.selection_options import Overlap, Rule, SelectionError, SelectionOptions
from tests.scores import random_scores
from tests.tiny import tiny_model

CPU = torch.device("cpu")
TOKENIZER = SimpleNamespace(
    all_special_ids=[0, 1],
    added_tokens_decoder={2: SimpleNamespace(special=True), 3: SimpleNamespace(special=False)},
    get_vocab=lambda: {str(token): token for token in range(60) if token != 30},
)


def _documents(**lengths: list[int]) -> dict[str, EncodedDocuments]:
    return {name: EncodedDocuments(tuple([0] + [5] * (length - 1) for length in of)) for name, of in lengths.items()}


def test_random_documents_have_the_numbers_and_lengths_of_the_others() -> None:
    drawn = random_documents(TOKENIZER, _documents(en=[9, 3, 5], vi=[4, 6, 8, 7, 2]), vocabulary=50).token_ids
    assert [len(ids) for ids in drawn] == [9, 6, 5, 7, 3]  # en 0, vi 1, en 2, vi 3, en 4 mod 3
    assert all(ids[0] == 0 for ids in drawn)
    again = random_documents(TOKENIZER, _documents(en=[9, 3, 5], vi=[4, 6, 8, 7, 2]), vocabulary=50).token_ids
    assert drawn == again


def test_random_tokens_are_uniform_and_not_special() -> None:
    (ids,) = random_documents(TOKENIZER, _documents(en=[9201]), vocabulary=50).token_ids
    counts = torch.bincount(torch.tensor(ids[1:]), minlength=60)
    known = torch.tensor([token for token in range(3, 50) if token != 30])
    assert int(counts[known].sum()) == 9200
    assert int(counts[known].min()) > 140  # 200 expected, standard deviation 14
    assert int(counts[known].max()) < 260


def _scores() -> Scores:
    made = random_scores()
    on_random = made.of("lape").mean(dim=0)
    return Scores(made.by_method, made.info, made.outputs, on_random={"lape": on_random})


def test_a_neuron_that_scores_as_high_on_random_tokens_is_not_taken() -> None:
    scores = _scores()
    above = scores.of("lape") > scores.on_random["lape"]
    for overlap in Overlap:
        plain = order(scores, "lape", overlap=overlap)
        contrasted = order(scores, "lape", "random-tokens", overlap=overlap)
        for index, language in enumerate(scores.info.languages):
            kept = [place for place in plain[language].tolist() if above[index, place[0], place[1]]]
            assert contrasted[language].tolist() == kept
            assert kept
            assert overlap is Overlap.EXCLUSIVE or len(kept) < len(plain[language])
    mask = select(scores, SelectionOptions("lape", count=3, contrast="random-tokens")).masks["vi"]
    assert bool((above[1] | (mask.intermediate == 1)).all())
    published = select(scores, SelectionOptions("lape", Rule.Z, z=0.1, contrast="random-tokens")).masks["vi"]
    assert bool((above[1] | (published.intermediate == 1)).all())
    with pytest.raises(SelectionError, match="rank best for en; choose a smaller budget, or another contrast"):
        select(scores, SelectionOptions("lape", budget=0.9, contrast="random-tokens"))


def test_an_equal_score_is_as_high() -> None:
    made = _scores()
    scores = Scores(made.by_method, made.info, on_random={"lape": made.of("lape")[0]})
    assert len(order(scores, "lape", "random-tokens")["en"]) == 0


def test_controls_follow_the_contrast_of_their_model() -> None:
    scores = _scores()
    options = {"count": 10, "contrast": "random-tokens"}
    model = select(scores, SelectionOptions("lape", **options)).masks
    control = select(scores, SelectionOptions("random", quotas="like:lape", **options)).masks
    for language, mask in model.items():
        assert mask.neurons_per_layer() == control[language].neurons_per_layer()


def test_what_has_no_scores_on_random_tokens_is_refused() -> None:
    scores = _scores()
    with pytest.raises(ScoresError, match=r"'attnlrp' on random tokens; there are of lape\. `crane relevance --random"):
        order(scores, "attnlrp", "random-tokens")
    with pytest.raises(ScoresError, match="there are of no method"):
        order(random_scores(), "lape", "random-tokens")
    for options in ({"rule": Rule.EXPERTS, "count": 1}, {"rule": Rule.Z, "output_dimensions": True}):
        with pytest.raises(SelectionError, match="contrast random-tokens knows neither experts nor output dimensions"):
            SelectionOptions("crane", contrast="random-tokens", **options)
    with pytest.raises(ContrastError, match="margin, random-tokens"):
        find_contrast("nope")


def _run(*arguments: object, fails: bool = False) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert (result.exit_code != 0) == fails, result.output
    return " ".join(result.output.split())


def test_commands_score_random_tokens(tmp_path: Path) -> None:
    model, corpus = tiny_model("llama", tmp_path / "model"), tmp_path / "corpus"
    corpus.mkdir()
    for language, text in {"en": "the river runs", "zh": "河水流过"}.items():
        (corpus / f"{language}.txt").write_text("".join(f"{text} {number}\n" for number in range(6)))
    common = (model, "--corpus", corpus, "--dtype", "float32", "--batch-tokens", 60)
    methods = ("--methods", "magnitude,average-precision,gradient,random")
    plain, contrasted, halves = (tmp_path / f"{name}.safetensors" for name in ("plain", "contrasted", "halves"))
    _run("relevance", *common, *methods, "--out", plain)
    said = _run("relevance", *common, *methods, "--random-tokens", "--out", contrasted)
    assert "18 of 18 documents" in said
    _run("relevance", *common, *methods, "--random-tokens", "--halves", "--out", halves)
    without, found, of_halves = map(Scores.load, (plain, contrasted, halves))
    assert set(found.on_random) == {"magnitude"}
    assert torch.allclose(of_halves.on_random["magnitude"], found.on_random["magnitude"], atol=1e-6)
    assert not without.on_random
    assert found.info.languages == ("en", "zh")
    assert found.info.model_dump() == without.info.model_dump()
    for method, scores in without.by_method.items():
        assert torch.equal(found.of(method), scores)

    loaded = load_model(model, torch.float32, CPU)
    decoder, tokenizer = decoder_of(loaded), load_tokenizer(model)
    encoded = {
        language: EncodedDocuments(tuple(tokenizer(line)["input_ids"] for line in path.read_text().splitlines()))
        for language, path in (("en", corpus / "en.txt"), ("zh", corpus / "zh.txt"))
    }
    drawn = random_documents(tokenizer, encoded, decoder.vocabulary).token_ids
    magnitude = Magnitude(units_of(decoder))
    with ModelPasses(loaded) as passes:
        for ids in drawn:
            passes.run(Batch.of([ids], CPU), [magnitude])
    assert torch.allclose(magnitude.finalise().float(), found.on_random["magnitude"], atol=1e-5)

    masks = tmp_path / "masks"
    _run("select", contrasted, "--method", "magnitude", "--count", 9, "--contrast", "random-tokens", "--out", masks)
    said = _run("select", plain, "--method", "magnitude", "--contrast", "random-tokens", "--out", masks, fails=True)
    assert "no scores of method 'magnitude' on random tokens" in said
    refused = _run("relevance", *common, "--methods", "gradient", "--random-tokens", "--out", plain, fails=True)
    assert "random tokens are scored by methods of activations, such as magnitude and lape" in refused
