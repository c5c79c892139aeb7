"""The page: its controls, and what happens when they are used."""

import asyncio
import functools
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from importlib.resources import files
from typing import Any

import gradio

from clients import AsyncCraneClient, CraneError
from clients.answers import Scores
from clients.errors import EvaluationError
from crane_serve.common.masks.library import UNMASKED
from crane_serve.common.masks.positions import Positions
from crane_serve.common.reports.render import table_style
from crane_serve.service.playground import shown
from crane_serve.service.playground.comparison import Comparison
from crane_serve.service.playground.evaluation import EvaluationFile
from crane_serve.service.playground.service import MAX_MASKS, Service, explained

_FONTS = ("system-ui", "sans-serif")
_FIRST_MASKS = 2  # that are chosen before the visitor chooses
_NO_EVALUATION = "This server was started without an evaluation. --evaluation DIR names one, made by `crane eval`."
_HEADER = """<header><h1>crane-serve playground</h1>
<p>Ask one model under several masks at once. A mask switches off the neurons that a language needs.</p></header>"""


def head() -> str:
    """What the page's head holds beside Gradio's own."""
    directory = files(__package__)
    style, script = (directory.joinpath(name).read_text() for name in ("playground.css", "playground.js"))
    return f"<style>.gradio-container {{ {table_style()} }}\n{style}</style><script>{script}</script>"


def theme() -> Any:
    """Gradio's plainest theme, with fonts that the reader's system has: the default ones are fetched from others."""
    plain = gradio.themes.Base(
        primary_hue="blue", neutral_hue="slate", font=_FONTS, font_mono=("ui-monospace", "monospace")
    )
    return plain.set(  # darker than its own, which are too pale to be read by everybody
        color_accent="*primary_700",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        input_placeholder_color="*neutral_500",
    )


def lay_out(service: Service, evaluation: EvaluationFile) -> gradio.Blocks:
    """The page over a service."""
    page = _Page(service, evaluation)
    with gradio.Blocks(title="crane-serve playground", analytics_enabled=False) as blocks:
        gradio.HTML(_HEADER, **_PLAIN)
        with gradio.Row(visible=False, elem_id="key-row", equal_height=True) as key_row:
            key = gradio.Textbox(
                label="API key",
                type="password",
                max_lines=1,
                html_attributes=gradio.InputHTMLAttributes(autocomplete="off"),
                elem_id="api-key",
                info="Sent with your requests, and kept nowhere",
                scale=4,
            )
            connect = gradio.Button("Use this key", elem_id="connect", scale=1, min_width=120)
        connection = gradio.HTML(shown.status("Connecting ..."), elem_id="connection", **_PLAIN)
        masks = gradio.Dropdown(
            [UNMASKED],
            value=[UNMASKED],
            label="Masks to compare",
            info=f"Up to {MAX_MASKS}. Or type an expression and press Enter: zh,vi is both, zh@0.5 half of it.",
            multiselect=True,
            allow_custom_value=True,
            max_choices=MAX_MASKS,
            elem_id="masks",
        )
        with gradio.Accordion("Build an expression", open=False, elem_id="builder"):
            with gradio.Row(equal_height=True):
                parts = gradio.Dropdown([], label="Masks to join", multiselect=True, elem_id="parts")
                factor = gradio.Slider(
                    0, 2, value=0, step=0.05, label="Strength left", info="0 is off, 1 as unmasked", elem_id="factor"
                )
                add = gradio.Button("Add to the masks", elem_id="add", min_width=120)
            built = gradio.HTML(shown.status(""), elem_id="built", **_PLAIN)

        with gradio.Tabs(elem_id="tabs"):
            with gradio.Tab("Generate", elem_id="generate-tab"):
                prompt = gradio.Textbox(label="Prompt", lines=2, max_lines=8, elem_id="prompt")
                gradio.HTML(shown.examples("prompt"), **_PLAIN)
                with gradio.Accordion("Sampling", open=False, elem_id="sampling"), gradio.Row():
                    most = gradio.Slider(1, 512, value=48, step=1, label="Most tokens", elem_id="max-tokens")
                    temperature = gradio.Slider(0, 2, value=0, step=0.05, label="Temperature")
                    top_p = gradio.Slider(0.05, 1, value=1, step=0.05, label="Top p")
                    penalty = gradio.Slider(1, 2, value=1, step=0.05, label="Repetition penalty")
                    seed = gradio.Number(value=0, precision=0, minimum=0, label="Seed", elem_id="seed")
                    positions = gradio.Radio(
                        [*Positions], value=Positions.ALL, label="Masked tokens", elem_id="positions"
                    )
                with gradio.Row():
                    generate = gradio.Button("Generate", variant="primary", elem_id="generate")
                    stop = gradio.Button("Stop", elem_id="stop")
                generated = gradio.HTML(shown.status(""), elem_id="generated", **_PLAIN)
                completions = gradio.HTML("", elem_id="completions", **_PLAIN)
            with gradio.Tab("Loss", elem_id="loss-tab"):
                text = gradio.Textbox(label="Reference text", lines=3, max_lines=12, elem_id="text")
                gradio.HTML(shown.examples("text", texts=True), **_PLAIN)
                score = gradio.Button("Compute the loss", variant="primary", elem_id="score")
                scored = gradio.HTML(shown.status(""), elem_id="scored", **_PLAIN)
                losses = gradio.HTML("", elem_id="losses", **_PLAIN)
            with gradio.Tab("Layers", elem_id="layers-tab"):
                look = gradio.Button("Show the chosen masks' neurons", variant="primary", elem_id="look")
                looked = gradio.HTML(shown.status(""), elem_id="looked", **_PLAIN)
                neurons = gradio.HTML("", elem_id="neurons", **_PLAIN)
            with gradio.Tab("Evaluation", elem_id="evaluation-tab"):
                with gradio.Row(equal_height=True):
                    task = gradio.Dropdown([], label="Task and metric", visible=False, elem_id="task", scale=3)
                    show = gradio.Button("Show", variant="primary", elem_id="show", scale=1, min_width=120)
                evaluated = gradio.HTML(shown.status(""), elem_id="evaluated", **_PLAIN)
                matrix = gradio.HTML("", elem_id="matrix", **_PLAIN)

        asked = [prompt, masks, most, temperature, top_p, penalty, seed, positions]
        for trigger in (blocks.load, connect.click, key.submit):
            _on(trigger, page.connect, [key], [key_row, connection, masks, parts])
        _on(add.click, page.add, [key, masks, parts, factor], [masks, built])
        _on(generate.click, page.generate, [key, *asked], [generated, completions])
        _on(stop.click, page.stop, [key], [])
        _on(score.click, page.score, [key, text, masks], [scored, losses])
        _on(look.click, page.look, [key, masks], [looked, neurons])
        for trigger in (show.click, task.input):
            _on(trigger, page.show, [key, task], [task, evaluated, matrix])
    return blocks


_PLAIN: dict[str, Any] = {"js_on_load": None, "apply_default_css": False}


def _on(trigger: Any, function: Any, inputs: list[Any], outputs: list[Any]) -> None:
    """Values reach the functions as the page sends them: what is wrong with one is said there, or by the service."""
    trigger(
        function,
        inputs,
        outputs,
        preprocess=False,
        show_progress="hidden",
        api_visibility="private",
        concurrency_limit=None,
    )


class _Page:
    """What the controls do. The first argument of each is the key's place, which is empty: it is in the headers."""

    def __init__(self, service: Service, evaluation: EvaluationFile) -> None:
        self._service = service
        self._evaluation = evaluation

    async def connect(self, _: Any, request: gradio.Request) -> tuple[Any, str, Any, Any]:
        """Find the masks that there are."""

        async def ask(client: AsyncCraneClient) -> tuple[Any, Any]:
            return await client.masks(), await client.ready()

        try:
            listing, readiness = await self._ask(request, ask)
        except Exception as error:
            refused = error if isinstance(error, CraneError) and error.status == 401 else None
            is_new = refused is not None and refused.code == "missing_api_key"
            said = "This server asks for an API key." if is_new else explained(error)
            nothing = gradio.update(choices=[UNMASKED], value=[UNMASKED])
            row = gradio.update(visible=True) if refused is not None or isinstance(error, ValueError) else gradio.skip()
            return row, shown.status(said, is_error=not is_new), nothing, gradio.update(choices=[], value=[])
        names = [mask.name for mask in listing.masks]
        own = [mask.name for mask in listing.masks if mask.name == f"{listing.default_method}-{mask.language}"]
        chosen = [UNMASKED, *(own or names)[-_FIRST_MASKS:]]
        broken = f" {_counted(len(listing.invalid), 'mask file')} cannot be used." if listing.invalid else ""
        said = f"Connected to {readiness.model}, with {_counted(len(names), 'mask')}.{broken}"
        return (
            gradio.skip(),
            shown.status(said),
            gradio.update(choices=[UNMASKED, *names], value=chosen),
            gradio.update(choices=names, value=[]),
        )

    async def add(self, _: Any, masks: Any, parts: Any, factor: Any) -> tuple[Any, str]:
        """Join masks to an expression and choose it."""
        joined = _texts(parts)
        if not joined:
            return gradio.skip(), shown.status("Choose at least one mask to join.", is_error=True)
        suffix = "" if not isinstance(factor, int | float) or factor == 0 else f"@{factor:g}"
        expression = ",".join(f"{name}{suffix}" for name in joined)
        chosen = list(dict.fromkeys([*_texts(masks), expression]))
        if len(chosen) > MAX_MASKS:
            return gradio.skip(), shown.status(_too_many(), is_error=True)
        return gradio.update(value=chosen), shown.status(f"Added {expression}.")

    async def generate(
        self,
        _: Any,
        prompt: Any,
        masks: Any,
        most: Any,
        temperature: Any,
        top_p: Any,
        penalty: Any,
        seed: Any,
        positions: Any,
        request: gradio.Request,
    ) -> AsyncGenerator[tuple[Any, Any]]:
        """Continue the prompt under each mask."""
        chosen, problem = _chosen(masks)
        if not isinstance(prompt, str) or not prompt.strip():
            problem = "Write a prompt first, or pick one below."
        if problem:
            yield shown.status(problem, is_error=True), ""
            return
        sampling = {
            "max_tokens": most,
            "temperature": temperature,
            "top_p": top_p,
            "repetition_penalty": penalty,
            **({} if seed is None else {"seed": seed}),
        }
        comparison = Comparison(prompt, chosen, sampling, positions)
        try:
            client = self._service.client(request)
        except ValueError as error:
            yield shown.status(str(error), is_error=True), ""
            return
        start = functools.partial(self._service.start, request)
        async with client, aclosing(comparison.run(client, start)) as changes:
            yield (
                shown.status(f"Generating under {_counted(len(chosen), 'mask')} ..."),
                shown.cards(prompt, comparison.columns),
            )
            async for _change in changes:
                yield gradio.skip(), shown.cards(prompt, comparison.columns)
        yield _outcome(comparison), shown.cards(prompt, comparison.columns)

    async def stop(self, _: Any, request: gradio.Request) -> None:
        """End what the visitor has asked for."""
        self._service.leave(request)

    async def score(self, _: Any, text: Any, masks: Any, request: gradio.Request) -> tuple[Any, Any]:
        """The loss of a text under each mask."""
        chosen, problem = _chosen(masks)
        if not isinstance(text, str) or not text.strip():
            problem = "Write a text first, or pick one below."
        if problem:
            return shown.status(problem, is_error=True), ""

        async def ask(client: AsyncCraneClient) -> list[tuple[str, Scores | str]]:
            async def one(mask: str) -> tuple[str, Scores | str]:
                try:
                    return mask, await client.score_text(text, mask=mask)
                except Exception as error:
                    return mask, explained(error)

            return await asyncio.gather(*map(one, chosen))

        try:
            answers = await self._ask(request, ask)
        except Exception as error:
            return shown.status(explained(error), is_error=True), ""
        failed = sum(isinstance(answer, str) for _, answer in answers)
        said = f"Scored under {_counted(len(answers) - failed, 'mask')}." + (f" {failed} failed." if failed else "")
        return shown.status(said, is_error=failed > 0), shown.losses(answers)

    async def look(self, _: Any, masks: Any, request: gradio.Request) -> tuple[Any, Any]:
        """Where the neurons of the chosen masks sit."""
        chosen, problem = _chosen(masks)
        names = list(dict.fromkeys(name for mask in chosen if mask != UNMASKED for name in _names(mask)))
        if not problem and not names:
            problem = f"Choose a mask; {UNMASKED} has no neurons."
        if problem:
            return shown.status(problem, is_error=True), ""

        async def ask(client: AsyncCraneClient) -> list[Any]:
            return await asyncio.gather(*map(client.mask_neurons, names))

        try:
            found = {mask.name: mask for mask in await self._ask(request, ask)}
        except Exception as error:
            return shown.status(explained(error), is_error=True), ""
        return shown.status(f"{_counted(len(found), 'mask')} shown."), shown.layers_and_overlap(list(found.values()))

    async def show(self, _: Any, task: Any, request: gradio.Request) -> tuple[Any, Any, Any]:
        """The heat map of the operator's evaluation, for those who may see the masks."""
        try:
            await self._ask(request, lambda client: client.masks())
            evaluation = await asyncio.to_thread(self._evaluation.read)
        except Exception as error:
            is_known = isinstance(error, CraneError | EvaluationError)
            return gradio.skip(), shown.status(str(error) if is_known else explained(error), is_error=True), ""
        if evaluation is None:
            return gradio.skip(), shown.status(_NO_EVALUATION), ""
        names = shown.task_names(evaluation)
        choice = task if task in names else names[0]
        return (
            gradio.update(choices=names, value=choice, visible=True),
            shown.status(f"Shown: {choice}."),
            shown.heat_map(evaluation, choice),
        )

    async def _ask(self, request: gradio.Request, work: Any) -> Any:
        async def run() -> Any:
            async with self._service.client(request) as client:
                return await work(client)

        task = self._service.start(request, run())
        await asyncio.wait({task})
        if task.cancelled():
            raise ValueError("Stopped.")
        return task.result()


def _outcome(comparison: Comparison) -> str:
    count = len(comparison.columns)
    if comparison.failed:
        return shown.status(f"{comparison.failed} of {_counted(count, 'mask')} failed.", is_error=True)
    if comparison.is_stopped:
        return shown.status("Stopped.")
    parts = [f"{column.mask}: {shown.language_name(column.language)}" for column in comparison.columns]
    return shown.status(f"Done under {_counted(count, 'mask')}. {'; '.join(parts)}.")


def _chosen(masks: Any) -> tuple[list[str], str]:
    """The masks, and what is wrong with the choice."""
    chosen = _texts(masks)
    if not chosen:
        return [], f"Choose at least one mask, or {UNMASKED}."
    return (chosen, "") if len(chosen) <= MAX_MASKS else ([], _too_many())


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _too_many() -> str:
    return f"At most {MAX_MASKS} masks can be compared at once."


def _texts(values: Any) -> list[str]:
    """The different texts in a list of them."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        return []
    return list(dict.fromkeys(value.strip() for value in values if isinstance(value, str) and value.strip()))


def _names(expression: str) -> list[str]:
    """The masks that an expression joins."""
    return [part.partition("@")[0].strip() for part in expression.split(",") if part.partition("@")[0].strip()]
