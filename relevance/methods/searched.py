"""Methods that search with the model's own predictions under masks; their scores are added to a scores file."""

from relevance.method import Method, ScoreSource


class AblationRefined(Method):
    """Neurons ranked by what switching them off does to each language. Scores are written by `crane refine`.

    No publication: a search of our own, described in `relevance.search.refinement`.
    """

    name = "ablation-refined"
    source = ScoreSource.ELSEWHERE


class Learned(Method):
    """Neurons ranked by a mask that gradient descent has found. Scores are written by `crane learn`.

    No publication: a search of our own, described in `relevance.search.learning`.
    """

    name = "learned"
    source = ScoreSource.ELSEWHERE
