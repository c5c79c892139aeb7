"""The playground in a browser: what a person can do there, with a mouse, with a keyboard, on a telephone."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.api.serve_fake import FakeServer
from tests.browser.conftest import USER_KEY, Visit, visiting
from tests.tiny import byte_tokenizer

PROMPT = "In the morning"
BAD = ("serious", "critical")


def violations(page: Page) -> list[str]:
    """What axe-core calls serious or critical."""
    found = Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {one['help']}: {[node['target'] for node in one['nodes']]}"
        for one in found
        if one["impact"] in BAD
    ]


def overflow(page: Page) -> int:
    """How many pixels the page is wider than the window."""
    width: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return width


class TestGenerate:
    def test_the_page_shows_what_the_server_has(self, visit: Visit) -> None:
        visit.open()
        expect(visit.page).to_have_title("crane-serve playground")
        expect(visit.status("connection")).to_have_text("Connected to tiny, with 4 masks. 1 mask file cannot be used.")
        expect(visit.page.locator("#api-key")).to_be_hidden()

    def test_two_masks_say_different_things_in_their_languages(self, visit: Visit) -> None:
        visit.open().choose("none", "zh", "vi").generate(PROMPT)
        for mask, language, said in (
            ("none", "en", "the old bridge"),
            ("zh", "vi", "cây cầu cũ"),
            ("vi", "zh", "河上的旧桥"),
        ):
            card = visit.card(mask)
            expect(card.locator(".completion")).to_contain_text(said)
            expect(card.locator(".completion")).to_have_attribute("lang", language)
            expect(card.locator(".language")).to_contain_text(f"({language})")
            expect(card.locator(".prompt")).to_have_text(PROMPT)
        expect(visit.status("generated")).to_contain_text("Done under 3 masks")

    def test_text_comes_as_it_is_made(self, visit: Visit) -> None:
        visit.open().choose("none", "zh")
        visit.page.get_by_label("Prompt", exact=True).fill(PROMPT)
        visit.page.evaluate(
            """() => {
                window.lengths = [];
                const watched = document.querySelector("#completions");
                const note = () => {
                    const texts = [...watched.querySelectorAll(".completion")].map((one) => one.textContent.length);
                    window.lengths.push(texts);
                };
                new MutationObserver(note).observe(watched, {childList: true, subtree: true, characterData: true});
            }"""
        )
        visit.page.get_by_role("button", name="Generate", exact=True).click()
        expect(visit.status("generated")).to_contain_text("Done under 2 masks")
        seen = [tuple(lengths) for lengths in visit.page.evaluate("window.lengths") if len(lengths) == 2]
        for column in range(2):
            grown = sorted({lengths[column] for lengths in seen})
            assert len(grown) >= 3, seen

    def test_tokens_show_what_the_mask_changed(self, visit: Visit) -> None:
        """The engine gives each token 0.5 nats under a mask, and its number of nats without one."""
        visit.open().choose("none", "en").generate(PROMPT)
        tokens = visit.card("en").locator(".token")
        expect(tokens).to_have_count(48)
        expect(tokens.first).to_have_attribute("title", re.compile(r"^60\.7 %, without a mask \d\.\de-\d+ %$"))
        expect(tokens.first).to_have_class(re.compile(r"\bup\b"))
        assert tokens.first.evaluate("one => getComputedStyle(one).backgroundColor") != "rgba(0, 0, 0, 0)"
        expect(visit.page.locator("#legend")).to_be_visible()
        visit.card("en").get_by_text("Token probabilities", exact=True).click()
        rows = visit.card("en").locator("tbody tr")
        expect(rows).to_have_count(48)
        expect(rows.nth(1).locator("th")).to_have_text("b")
        expect(rows.nth(1).locator("td").last).to_have_text(f"+{byte_tokenizer()('b').input_ids[-1] - 0.5:.2f}")
        expect(visit.card("none").locator(".token")).to_have_count(0)  # its words are several tokens each

    def test_a_mask_that_there_is_not(self, visit: Visit) -> None:
        visit.open().choose("none", "xx").generate(PROMPT)
        expect(visit.card("xx").locator(".problem")).to_contain_text("unknown mask 'xx'")
        expect(visit.card("none").locator(".completion")).to_contain_text("the old bridge")
        expect(visit.page.get_by_role("alert").filter(has_text="1 of 2 masks failed")).to_be_visible()

    def test_a_window_of_masked_tokens(self, visit: Visit) -> None:
        visit.open().choose("none", "vi")
        visit.page.get_by_text("Sampling", exact=True).click()
        visit.page.get_by_label("Masked tokens").fill("generated[:4]+prompt")
        visit.generate(PROMPT)
        expect(visit.card("vi").locator(".problem")).to_contain_text("a window as in 'prompt[-4:]'")
        expect(visit.card("none").locator(".completion")).to_contain_text("the old bridge")
        visit.page.get_by_label("Masked tokens").fill(" prompt[-2:]+generated[:4] ")
        with visit.page.expect_request(lambda request: '"mask":"vi"' in (request.post_data or "")) as asked:
            visit.generate(PROMPT)
        assert asked.value.post_data_json["positions"] == "prompt[-2:]+generated[:4]"
        expect(visit.card("vi").locator(".completion")).to_contain_text("河上的旧桥")

    def test_an_example_fills_the_prompt(self, visit: Visit) -> None:
        visit.open().choose("none")
        example = visit.page.locator('.example[data-fills="prompt"][lang="vi"]').first
        text = example.text_content()
        example.click()
        expect(visit.page.get_by_label("Prompt", exact=True)).to_have_value(str(text))
        visit.page.get_by_role("button", name="Generate", exact=True).click()
        expect(visit.card("none").locator(".prompt")).to_have_text(str(text))

    def test_nothing_to_continue(self, visit: Visit) -> None:
        visit.open()
        visit.page.get_by_role("button", name="Generate", exact=True).click()
        expect(visit.page.get_by_role("alert").filter(has_text="Write a prompt first")).to_be_visible()

    def test_unions_and_factors(self, visit: Visit) -> None:
        visit.open().choose("none")
        visit.page.get_by_text("Build an expression").click()
        parts = visit.page.get_by_label("Masks to join")
        for name in ("attnlrp-zh", "attnlrp-vi"):
            parts.fill(name)
            parts.press("Enter")
        visit.page.get_by_role("button", name="Add to the masks").click()
        expect(visit.status("built")).to_have_text("Added attnlrp-zh,attnlrp-vi.")
        visit.page.get_by_role("button", name="Remove attnlrp-vi", exact=True).click()
        visit.page.get_by_label("Strength left").fill("0.5")
        visit.page.get_by_role("button", name="Add to the masks").click()
        expect(visit.status("built")).to_have_text("Added attnlrp-zh@0.5.")
        visit.generate(PROMPT)
        expect(visit.card("attnlrp-zh,attnlrp-vi").locator(".completion")).to_contain_text("le vieux pont")
        expect(visit.card("attnlrp-zh@0.5").locator(".completion")).to_contain_text("die alte")
        expect(visit.card("attnlrp-zh,attnlrp-vi").locator(".language")).to_have_text("French (fr)")

    def test_stop(self, visit: Visit) -> None:
        visit.open().choose("none", "zh")
        visit.page.get_by_label("Prompt", exact=True).fill("hang")
        visit.page.get_by_role("button", name="Generate", exact=True).click()
        expect(visit.card("none").locator(".completion")).to_have_text(" the")
        visit.page.get_by_role("button", name="Stop").click()
        expect(visit.status("generated")).to_have_text("Stopped.")
        expect(visit.card("none")).to_contain_text("stopped")

    def test_markup_stays_text(self, visit: Visit) -> None:
        visit.open().choose("none", "<img src=x onerror=alert(1)>").generate("<script>alert(1)</script>\u202ex")
        expect(visit.card("none").locator(".prompt")).to_have_text("<script>alert(1)</script>\ufffdx")
        expect(visit.page.locator("main img, main script")).to_have_count(0)

    def test_too_many_masks(self, visit: Visit) -> None:
        visit.open().choose(*(f"m{number}" for number in range(17))).generate(PROMPT)
        expect(visit.page.get_by_role("alert").filter(has_text="At most 16 masks")).to_be_visible()
        expect(visit.page.locator(".card")).to_have_count(0)


class TestOtherTabs:
    def test_the_loss_of_a_text(self, visit: Visit) -> None:
        visit.open().choose("none", "zh").tab("Loss")
        visit.page.get_by_label("Reference text").fill("abc")
        visit.page.get_by_role("button", name="Compute the loss").click()
        expect(visit.status("scored")).to_have_text("Scored under 2 masks.")
        rows = visit.page.locator("#losses tbody tr")
        unmasked, masked = (float(rows.nth(row).locator("td").first.inner_text()) for row in range(2))
        assert masked == pytest.approx(2 * unmasked, abs=0.002)
        tokens = visit.page.locator("#losses .token.down")
        expect(tokens).to_have_count(3)

    def test_where_neurons_sit_and_what_masks_share(self, visit: Visit) -> None:
        visit.open().choose("zh,vi", "lape-zh").tab("Layers")
        visit.page.get_by_role("button", name="Show the chosen masks' neurons").click()
        expect(visit.page.get_by_role("img", name=re.compile("attnlrp-zh: 2 neurons in 1 of 2 layers"))).to_be_visible()
        table = visit.page.get_by_role("table", name="Overlap of masks")
        expect(table.get_by_role("row")).to_have_count(4)
        expect(table).to_contain_text("2 shared")

    def test_the_evaluation(self, visit: Visit) -> None:
        visit.open().tab("Evaluation")
        visit.page.get_by_role("button", name="Show", exact=True).click()
        expect(visit.page.locator("#matrix td.loss").first).to_be_visible()
        expect(visit.page.locator("#matrix tbody th").first).to_have_text(re.compile("attnlrp"))
        names = visit.page.locator("#task option").all_text_contents()
        visit.page.get_by_label("Task and metric").select_option(names[-1])
        expect(visit.status("evaluated")).not_to_contain_text("Loss")


class TestKeys:
    def test_nothing_without_a_key(self, stranger: Visit) -> None:
        stranger.open()
        expect(stranger.status("connection")).to_have_text("This server asks for an API key.")
        assert "attnlrp" not in stranger.page.content()
        stranger.generate(PROMPT)
        expect(stranger.card("none").locator(".problem")).to_contain_text("no API key")

    def test_a_wrong_key(self, stranger: Visit) -> None:
        stranger.open()
        stranger.page.get_by_label("API key").fill("a-wrong-key-of-some-length")
        stranger.page.get_by_role("button", name="Use this key").click()
        expect(stranger.page.get_by_role("alert").filter(has_text="no such API key")).to_be_visible()
        assert "attnlrp" not in stranger.page.content()

    def test_what_is_no_key(self, stranger: Visit) -> None:
        stranger.open()
        stranger.page.get_by_label("API key").fill("two words")
        stranger.page.get_by_label("API key").press("Enter")
        expect(stranger.page.get_by_role("alert").filter(has_text="no blanks")).to_be_visible()

    def test_the_right_key(self, stranger: Visit, closed_server: FakeServer) -> None:
        stranger.open()
        stranger.page.get_by_label("API key").fill(USER_KEY)
        stranger.page.get_by_label("API key").press("Enter")
        expect(stranger.status("connection")).to_contain_text("Connected to tiny, with 4 masks.")
        stranger.choose("none", "zh").generate(PROMPT)
        expect(stranger.card("zh").locator(".completion")).to_contain_text("cây cầu cũ")
        stranger.tab("Evaluation").page.get_by_role("button", name="Show", exact=True).click()
        expect(stranger.status("evaluated")).to_contain_text("started without an evaluation")
        assert not any(USER_KEY in url for url in stranger.asked)
        assert USER_KEY not in closed_server.text
        kept = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
        assert USER_KEY not in stranger.page.evaluate(kept)
        assert stranger.page.evaluate("indexedDB.databases()") == []
        assert {line["key"] for line in closed_server.lines if line.get("route") == "/generate"} <= {"user", None}


class TestEverybody:
    def test_with_a_keyboard_alone(self, visit: Visit) -> None:
        """Tab through the page, in the order in which it is read, and do everything with keys."""
        visit.open().choose("none", "zh")
        page = visit.page
        page.get_by_label("Prompt", exact=True).focus()
        page.keyboard.type(PROMPT)
        seen = []
        for _ in range(16):
            page.keyboard.press("Tab")
            name = page.evaluate("document.activeElement.textContent.trim() || document.activeElement.ariaLabel")
            seen.append(name)
            if page.evaluate("document.activeElement.id") == "generate":
                break
        assert seen[-1] == "Generate", seen
        assert seen[0].startswith("The capital of France"), seen  # the examples follow their field
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none"
        page.keyboard.press("Enter")
        expect(visit.status("generated")).to_contain_text("Done under 2 masks")
        page.get_by_role("tab", name="Generate").focus()
        page.keyboard.press("ArrowRight")
        expect(page.get_by_label("Reference text")).to_be_visible()
        expect(page.get_by_role("tab", name="Loss")).to_be_focused()
        page.keyboard.press("End")
        expect(page.get_by_role("button", name="Show", exact=True)).to_be_visible()

    def test_every_control_has_a_name(self, visit: Visit) -> None:
        visit.open()
        nameless = visit.page.evaluate(
            """() => [...document.querySelectorAll("input, textarea, select, button")]
                .filter((one) => one.offsetParent !== null)
                .filter((one) => !(one.labels?.length || one.ariaLabel || one.textContent.trim() || one.title
                                   || one.getAttribute("aria-labelledby")))
                .map((one) => one.outerHTML.slice(0, 200))"""
        )
        assert nameless == []

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_axe_finds_nothing_serious(self, browser: Browser, server: FakeServer, scheme: str) -> None:
        with visiting(browser, server, color_scheme=scheme) as visit:
            visit.open().choose("none", "zh", "xx").generate(PROMPT)
            assert violations(visit.page) == []
            visit.tab("Loss").page.get_by_label("Reference text").fill("abc")
            visit.page.get_by_role("button", name="Compute the loss").click()
            expect(visit.status("scored")).to_contain_text("Scored")
            assert violations(visit.page) == []
            visit.tab("Layers").choose("zh", "vi").page.get_by_role("button", name="Show the chosen").click()
            expect(visit.status("looked")).to_contain_text("2 masks")
            assert violations(visit.page) == []
            visit.tab("Evaluation").page.get_by_role("button", name="Show", exact=True).click()
            expect(visit.status("evaluated")).to_contain_text("Shown")
            assert violations(visit.page) == []

    def test_axe_finds_nothing_serious_where_a_key_is_asked_for(self, stranger: Visit) -> None:
        stranger.open()
        expect(stranger.page.get_by_label("API key")).to_be_visible()
        assert violations(stranger.page) == []

    def test_on_a_narrow_screen(self, narrow_visit: Visit) -> None:
        visit = narrow_visit.open().choose("none", "zh").generate(PROMPT)
        assert overflow(visit.page) == 0
        boxes = [visit.card(mask).bounding_box() for mask in ("none", "zh")]
        assert boxes[0] is not None
        assert boxes[1] is not None
        assert boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"]
        visit.tab("Layers").page.get_by_role("button", name="Show the chosen").click()
        expect(visit.status("looked")).to_contain_text("1 mask")
        assert overflow(visit.page) == 0
        visit.tab("Evaluation").page.get_by_role("button", name="Show", exact=True).click()
        expect(visit.status("evaluated")).to_contain_text("Shown")
        assert overflow(visit.page) == 0


class TestTheServerBehindIt:
    @pytest.fixture
    def own_server(self, browser: Browser, tmp_path: Path) -> Iterator[FakeServer]:
        server = FakeServer(tmp_path, talks=True, playground=True, drain_timeout_s=30)
        yield server
        server.kill()

    def test_an_open_page_does_not_hold_it_up(self, browser: Browser, own_server: FakeServer) -> None:
        with visiting(browser, own_server) as visit:
            visit.open().choose("none").generate(PROMPT)
            own_server.signal(signal.SIGTERM)
            own_server.process.join(5)
            assert own_server.process.exitcode == 0
        assert "Traceback" not in own_server.text

    def test_a_person_who_leaves_ends_what_was_asked(self, browser: Browser, own_server: FakeServer) -> None:
        with visiting(browser, own_server) as visit:
            visit.open().choose("none", "zh")
            visit.page.get_by_label("Prompt", exact=True).fill("hang")
            visit.page.get_by_role("button", name="Generate", exact=True).click()
            expect(visit.card("zh").locator(".completion")).not_to_be_empty()
            visit.page.close()
            own_server.wait_for('"status": 499')
        ended = [line["status"] for line in own_server.lines if line.get("route") == "/generate"]
        assert ended == [499, 499]
        own_server.signal(signal.SIGTERM)
        own_server.process.join(5)
        assert own_server.process.exitcode == 0
        assert "Traceback" not in own_server.text


@pytest.mark.engine
def test_a_real_engine(browser: Browser, tiny_server: object) -> None:
    with visiting(browser, f"{tiny_server.url}/") as visit:  # type: ignore[attr-defined]
        visit.open().choose("none", "zh").generate(PROMPT)
        for mask in ("none", "zh"):
            expect(visit.card(mask).locator(".completion")).not_to_be_empty()
        texts = [visit.card(mask).locator(".completion").text_content() for mask in ("none", "zh")]
        assert texts[0] != texts[1]
        expect(visit.card("zh")).to_contain_text("Digest")


@pytest.mark.skipif("CRANE_SCREENSHOTS" not in os.environ, reason="CRANE_SCREENSHOTS names no directory to write to")
def test_pictures_for_the_docs(browser: Browser, server: FakeServer) -> None:
    """Of CRANE_SCREENSHOTS_URL, under CRANE_SCREENSHOTS_MASKS, into CRANE_SCREENSHOTS."""
    directory = Path(os.environ["CRANE_SCREENSHOTS"])
    source = os.environ.get("CRANE_SCREENSHOTS_URL", server)
    masks = os.environ.get("CRANE_SCREENSHOTS_MASKS", "none attnlrp-zh attnlrp-vi").split()
    with visiting(browser, source) as visit:
        visit.open().choose(*masks)
        visit.page.locator('.example[data-fills="prompt"][lang="vi"]').first.click()
        visit.page.get_by_role("button", name="Generate", exact=True).click()
        expect(visit.status("generated")).to_contain_text("Done under", timeout=120_000)
        visit.page.screenshot(path=directory / "playground-wide.png", full_page=True)
        visit.tab("Layers").page.get_by_role("button", name="Show the chosen").click()
        expect(visit.status("looked")).to_contain_text("masks")
        visit.page.screenshot(path=directory / "playground-masks.png", full_page=True)
        visit.tab("Evaluation").page.get_by_role("button", name="Show", exact=True).click()
        expect(visit.status("evaluated")).to_contain_text("Shown")
        visit.page.screenshot(path=directory / "playground-evaluation.png")
    with visiting(browser, source, viewport={"width": 360, "height": 740}, device_scale_factor=2) as visit:
        visit.open().choose(*masks[:2])
        visit.page.locator('.example[data-fills="prompt"][lang="zh"]').first.click()
        visit.page.get_by_role("button", name="Generate", exact=True).click()
        expect(visit.status("generated")).to_contain_text("Done under", timeout=120_000)
        visit.page.screenshot(path=directory / "playground-narrow.png", full_page=True)
