"""The validation for readers: a page of Markdown, a page of HTML, a file of values, pictures."""

from collections.abc import Sequence
from pathlib import Path

from crane_serve.common.atomic import write_atomically
from crane_serve.common.reports.content import Picture, Section, Table
from crane_serve.common.reports.numbers import percent_text
from crane_serve.common.reports.render import html_page, markdown_page
from relevance.validation.result import Validation
from relevance.validation.tables import (
    Draws,
    budget_tables,
    by_budget,
    effects_table,
    layers_table,
    mask_table,
    matched_table,
    overlap_tables,
    settings_table,
    stability_table,
    texts_table,
)

REPORT_FILE = "report.md"
PAGE_FILE = "report.html"
EFFECTS_FILE = "effects.csv"
TITLE = "What the neurons of each method cost each language"


def write_all(result: Validation, directory: Path) -> list[Path]:
    """Write report.md, report.html, effects.csv and the pictures into `directory`; returns their paths.

    The page of HTML holds its pictures and needs no other file. Pictures that would be empty are left out.
    """
    from relevance.validation.pictures import draw

    pictures = draw(result)
    sections = report_sections(result, pictures)
    contents = {
        REPORT_FILE: markdown_page(TITLE, sections).encode(),
        PAGE_FILE: html_page(TITLE, sections).encode(),
        EFFECTS_FILE: effects_table(result).to_csv().encode(),
        **{picture.file: picture.png for picture in pictures},
    }
    for name, content in contents.items():
        write_atomically(directory / name, content)
    return [directory / name for name in contents]


def report_sections(result: Validation, pictures: Sequence[Picture] = ()) -> list[Section]:
    """Everything that the pages show, in order, each picture under the heading it belongs to."""

    def named(*names: str) -> tuple[Picture, ...]:
        return tuple(picture for picture in pictures if picture.name in names)

    return [
        Section("What was measured", _measured(result), (settings_table(result), texts_table(result))),
        Section("Collateral at matched effect", _about_matched(result), _matched_tables(result), named("collateral")),
        Section(
            "Effects by budget",
            _about_budgets(result),
            tuple(budget_tables(result)),
            named("dose-response", "trade-off"),
        ),
        Section("Published rules", _about_published(result), _published_tables(result)),
        Section("Overlap", _about_overlap(result), tuple(overlap_tables(result)), named("overlap")),
        Section("Stability", _about_stability(result), _stability_tables(result)),
        Section("Neurons per layer", _about_layers(result), _layer_tables(result), named("layers")),
    ]


def _measured(result: Validation) -> tuple[str, ...]:
    return (
        "A mask switches off a set of MLP neurons, chosen for one language. Every mask was measured in every language: "
        "its change is the loss in nats per token with the mask minus the loss of the whole model, over the tokens of "
        "all documents. Changes are signed; above 0 is a loss, below 0 a gain. Bold: the mask's own language.",
        f"[low, high] is a {result.confidence:.0%} percentile interval of a paired bootstrap over documents with "
        f"{result.resamples:,} resamples. It covers the choice of documents, not the choice of neurons, and is not "
        "corrected for the number of cells. A figure without brackets has no interval. Methods that draw their neurons "
        "are shown by the mean of their draws with (lowest to highest draw); effects.csv has each draw.",
        "Collateral is what the other languages lose on average, in nats per token, for each nat per token that the "
        "mask's own language loses: 0 is a mask that costs only its own language, 1 one that costs all the same, and "
        "below 0 the others gain. It does not exist where the own language loses nothing.",
        "LangSpec-F1 comes from CRANE's published evaluation code. Its scores are exp(-nats per token), the geometric "
        "mean probability of a token: B unmasked, M masked. With the drop d of each language, t the mask's own "
        "language, P = d_t / (d_t + mean of d over the others) and R, F1 = 2 P R / (P + R), that is b = 1. Relative "
        "form: d = max((B - M) / B, 0), R = d_t. Absolute form: d = max(B - M, 0), R = d_t / B_t. Both clip: a "
        "language that gains counts as one that loses nothing.",
    )


def _about_matched(result: Validation) -> tuple[str, ...]:
    if result.plan.effect is None:
        return ("No effect to match was planned.",)
    return (
        f"Each method takes the best of its ranking until the own language loses {result.plan.effect:g} nats per "
        "token. How many that takes was found on the texts for choosing; what is shown was measured on those for "
        "reporting, so the own changes differ somewhat. Methods are sorted by the mean over the languages, the least "
        "collateral first.",
    )


def _about_budgets(result: Validation) -> tuple[str, ...]:
    if not by_budget(result):
        return ("No budget was measured.",)
    controls = ""
    if result.plan.matched_to is not None:
        controls = (
            f' "random like {result.plan.matched_to}" and such draw as many neurons in each layer as that method.'
        )
    return (f"Masks of equal size.{controls} Equal size is not equal strength: compare the whole rows.",)


def _about_published(result: Validation) -> tuple[str, ...]:
    empty = ", ".join(f"{method} for {language}" for method, language in result.empty)
    nothing = (f"Takes no neuron: {empty}.",) if empty else ()
    if not result.of_rule("published"):
        return ("No method was tried with the rule it was published with.", *nothing)
    return ("Masks by the selection rule that each method was published with; their sizes differ.", *nothing)


def _about_overlap(result: Validation) -> tuple[str, ...]:
    if not result.overlaps:
        return ("No overlaps were computed.",)
    chance = result.overlap_budget / (2 - result.overlap_budget)
    return (
        f"Jaccard overlap, |intersection| / |union|, of the best {percent_text(result.overlap_budget)} of all neurons. "
        f"Two sets drawn at random overlap by about {chance:.3f}.",
    )


def _about_stability(result: Validation) -> tuple[str, ...]:
    if not result.stability:
        return ("No scores from halves of a corpus were given.",)
    return (
        "Jaccard overlap of the sets that a method chooses from two halves of a corpus, at "
        f"{percent_text(result.overlap_budget)} of all neurons. 1: the same neurons from both.",
    )


def _about_layers(result: Validation) -> tuple[str, ...]:
    if not result.layers:
        return ("No sets were counted.",)
    return (
        f"Where the best {percent_text(result.overlap_budget)} of all neurons lie, from the first layer to the last.",
    )


def _published_tables(result: Validation) -> tuple[Table, ...]:
    draws = Draws.group(result.of_rule("published"))
    return (mask_table(result, draws),) if draws else ()


def _stability_tables(result: Validation) -> tuple[Table, ...]:
    return (stability_table(result),) if result.stability else ()


def _layer_tables(result: Validation) -> tuple[Table, ...]:
    return (layers_table(result),) if result.layers else ()


def _matched_tables(result: Validation) -> tuple[Table, ...]:
    table = matched_table(result)
    return (table,) if table.rows else ()
