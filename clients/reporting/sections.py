"""The sections of the report, in order."""

from collections.abc import Mapping

from clients.evaluation import Evaluation
from clients.reporting.changes import changes_section
from clients.reporting.doses import doses_section
from clients.reporting.examples import Extent, examples_section
from clients.reporting.layers import layers_section
from clients.reporting.overview import overview_section
from clients.reporting.pictures import DOSES, LAYERS, MATRIX
from clients.reporting.selectivity import selectivity_section
from clients.reporting.substitution import substitution_section
from clients.task import Answers
from crane_serve.common.reports.content import Picture, Section


def report_sections(
    evaluation: Evaluation, answers: Answers, pictures: Mapping[str, tuple[Picture, ...]], extent: Extent
) -> list[Section]:
    """Everything that a page shows. pictures: by section, as `draw` returns them; extent: how many examples."""
    sections = (
        overview_section(evaluation),
        changes_section(evaluation, pictures[MATRIX]),
        substitution_section(evaluation),
        selectivity_section(evaluation),
        doses_section(evaluation, pictures[DOSES]),
        layers_section(evaluation, pictures[LAYERS]),
        examples_section(evaluation, answers, extent),
    )
    return [section for section in sections if section is not None]
