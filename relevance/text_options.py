"""Options of all commands that read texts."""

from typing import Annotated

import typer

from crane_serve.common.text.corpus import Form

TextColumn = Annotated[
    str, typer.Option(help="Field or column that holds the text, in which {lang} stands for the language.")
]
Normalise = Annotated[
    Form | None,
    typer.Option(help="Bring all texts into this normal form of Unicode.", show_default="as they are"),
]
ScoresForm = Annotated[
    Form | None,
    typer.Option(help="Bring all texts into this normal form of Unicode.", show_default="that of the scores' texts"),
]
