"""The page in a real browser: it opens, shows what it should by mouse, touch and keys, in light and
dark, on a phone, to a screen reader; and no text of anybody's does anything.

A browser takes a second a page: what a small change is unlikely to break is left to the full tests.
"""

import re
from contextlib import nullcontext

import pytest

from guided_decode.lab.trace import TracedPrompt, page
from scripts import trace_screenshot
from scripts.chromium import Missing, chromium
from tests import PATIENCE, ROOT
from tests.lab import traces
from tests.lab.browser import Opened

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
_DIRECTION = "(element) => getComputedStyle(element).direction"
# Contrast of WCAG's level AA for text.
READABLE = 4.5


@pytest.fixture(scope="module")
def browser():
    try:
        with chromium(PATIENCE) as found:
            yield found
    except Missing as missing:
        pytest.skip(str(missing))


@pytest.fixture
def opened(browser, tmp_path):
    pages = []

    def open_page(trace, **options):
        file = tmp_path / f"{len(pages)} & <b>.html"
        file.write_bytes(page(trace).encode("ascii"))
        pages.append(Opened(browser, file, **options))
        return pages[-1]

    yield open_page
    for each in pages:
        each.close()


def pair(**more):
    plain = traces.run(["one", " two", "\n", "three"], name="plain", own=0, guided=False)
    guided = traces.run(["one", " 2", "\n", "3", "</s>"], name="guided", **more)
    return traces.trace(TracedPrompt("", [("user", "Count.")], [plain, guided]))


def found():
    """A search's responses: two begin alike, and one is alone."""
    first, second = traces.run(list("abc"), name="response 1"), traces.run(list("ab"), own=1)
    third = traces.run(list("xyz"), name="response 3", own=2, facts={"score": 0.123456})
    prompt = TracedPrompt(
        "line 7", [("user", "Search.")], [first, second, third], method="best-of-n", chosen=2
    )
    return traces.trace(prompt, TracedPrompt("line 8", [("user", "Other.")], [first]))


def percent(share):
    part = 100 * share
    if part < 0.01:
        return "<0.01%" if part else "0%"
    return f"{part:.2f}%" if part < 1 else f"{part:.1f}%"


def number(value, signed=False):
    if value is None:
        return "—"
    text = f"{abs(value):.3f}"
    return ("−" if value < 0 else "+" if signed and value > 0 else "") + text


def assert_table_is_of(window, step, names):
    rows = window.rows()
    assert [row[0] for row in rows] == names
    for i, (_, shown, numbers, taken) in enumerate(rows):
        own = (step.probabilities[i], step.guided[i], step.values[i], step.advantages[i])
        assert shown == [percent(own[0]), percent(own[1]), number(own[2]), number(own[3], True)]
        told = [None if each is None else float(each) for each in numbers]
        assert told == [None if each is None else pytest.approx(each, rel=1e-3) for each in own]
        assert taken == (i == step.chosen)


def test_a_click_selects_a_token_and_shows_its_candidates(opened):
    window, trace = opened(pair()), pair()
    runs = trace.prompts[0].runs
    # Where the responses part, of the guided one.
    assert window.selected() == (1, 0)
    window.token(0, 1).click()
    assert window.selected() == (0, 1)
    assert_table_is_of(window, runs[0].steps[1], ["␣two", "other1", "other2", "other3"])
    assert window.page.locator("#which").inner_text() == (
        "plain, token 2 of 4: “␣two”, advantage −0.389, probability 49.9%, guided 6.2%"
    )
    window.token(1, 4).click()
    assert window.selected() == (1, 4)
    assert_table_is_of(window, runs[1].steps[4], ["other0", "</s>", "other2", "other3"])
    assert window.page.locator("#curve circle").get_attribute("data-token") == "4"


def test_keys_move_between_tokens_and_responses(opened):
    window = opened(pair())
    keyboard = window.page.keyboard
    window.page.locator("[role=listbox]").nth(1).focus()
    moves = [("ArrowRight", (1, 1)), ("ArrowRight", (1, 2)), ("ArrowLeft", (1, 1)),
             ("ArrowUp", (0, 1)), ("End", (0, 3)), ("ArrowRight", (0, 3)), ("ArrowDown", (1, 3)),
             ("End", (1, 4)), ("ArrowUp", (0, 3)), ("Home", (0, 0)), ("ArrowLeft", (0, 0)),
             ]  # fmt: skip
    for key, place in moves:
        keyboard.press(key)
        assert window.selected() == place, key
        said = window.page.get_by_role("status").inner_text()
        assert said.startswith(f"{('plain', 'guided')[place[0]]}, token {place[1] + 1} of "), key
        focused = window.page.evaluate("document.activeElement.dataset.run")
        assert focused == str(place[0]), key
    steps = pair().prompts[0].runs[0].steps
    assert_table_is_of(window, steps[0], ["one", "other1", "other2", "other3"])


@pytest.mark.slow
def test_everything_is_reached_by_the_tab_key_in_the_order_of_the_page(opened):
    window = opened(found())
    window.page.keyboard.press("Tab")
    order = []
    while (name := window.page.evaluate(
        "document.activeElement.id || document.activeElement.dataset.branch || "
        "document.activeElement.className")) and name not in order:  # fmt: skip
        order.append(name)
        window.page.keyboard.press("Tab")
    assert order == ["prompts", "words", "0", "2", "1", "tokens", "table"]


@pytest.mark.slow
def test_the_pointer_shows_candidates_and_leaves_the_selection(opened):
    window = opened(pair())
    window.token(1, 2).click()
    said = window.page.locator("#said").inner_text()
    window.token(0, 3).hover()
    assert window.selected() == (1, 2)
    assert window.rows()[0][0] == "three"
    assert window.page.locator("#which").inner_text().startswith("plain, token 4 of 4")
    # Nothing is read out that nobody chose.
    assert window.page.locator("#said").inner_text() == said
    window.page.locator("h1").hover()
    assert window.page.locator("#which").inner_text() == said
    assert window.rows()[1][0] == "↵"


def test_a_tap_selects_and_the_page_is_as_wide_as_a_phone(opened):
    window = opened(pair(), **PHONE)
    assert window.page.evaluate(_WIDTHS) == [360, 360]
    window.token(1, 3).tap()
    assert window.selected() == (1, 3)
    # The candidates are in sight, and do not hide the token.
    panel = window.page.locator("#panel")
    assert panel.bounding_box()["y"] < 740
    for key in ("End", "ArrowUp", "Home"):
        window.page.keyboard.press(key)
        token = window.token(*window.selected()).bounding_box()
        assert token["y"] >= 0
        assert token["y"] + token["height"] <= panel.bounding_box()["y"]


@pytest.mark.slow
def test_what_has_no_place_to_break_is_no_wider_than_a_phone(opened):
    wide = "W" * 300
    run = traces.run([wide, " b", "c"], visits=[{101: 12345678}] * 3)
    prompt = TracedPrompt(wide, [("user", wide)], [run], method=wide, chosen=0)
    trace = traces.trace(prompt, *traces.hostile().prompts, policy=wide, decoding={wide: wide})
    window = opened(trace, **PHONE)
    for i in ("0", "1", "2"):
        window.page.locator("#prompts").select_option(i)
        assert window.page.evaluate(_WIDTHS) == [360, 360]


# What would scroll, and what the browser made the window to show it all.
_WIDTHS = "[document.documentElement.scrollWidth, window.innerWidth]"


@pytest.mark.slow
def test_a_click_on_the_curve_selects_the_nearest_token(opened):
    window = opened(pair())
    box = window.page.locator("#curve svg").bounding_box()
    mark = window.page.locator("#curve circle")
    window.page.mouse.click(box["x"] + box["width"] - 2, box["y"] + 40)
    assert window.selected() == (1, 4)
    last = mark.bounding_box()
    window.page.mouse.click(box["x"] + 2, box["y"] + 40)
    assert window.selected() == (1, 0)
    assert mark.bounding_box()["x"] < last["x"]
    assert window.page.locator("#curve path").count() == 2


def test_a_search_is_a_tree_whose_branches_select_their_response(opened):
    window = opened(found())
    branches = window.page.locator("#tree button")
    texts = [text.replace("\n", " ") for text in branches.all_inner_texts()]
    assert [re.sub(r"\s+", " ", text) for text in texts] == [
        "ab 2 tokens, value 0.224 guided",
        "c 1 token, value 0.235 response 1",
        "xyz 3 tokens, value 0.235 ★ chosen: response 3, score 0.123",
    ]
    # Of responses that begin alike one is inside the other.
    assert window.page.locator("#tree li li").all_inner_texts() == branches.nth(1).all_inner_texts()
    assert window.selected()[0] == 2
    branches.nth(1).focus()
    window.page.keyboard.press("Enter")
    assert window.selected() == (0, 2)
    assert window.page.evaluate("document.activeElement.dataset.branch") == "2"
    current = window.page.locator("#tree button[aria-current=true]")
    assert [each.get_attribute("data-branch") for each in current.all()] == ["0", "2"]
    assert window.page.locator("article h3").all_inner_texts() == ["response 1"]
    assert window.page.locator("#curve path.thin").count() == 2
    assert window.page.locator("#curve path.second").count() == 1


@pytest.mark.slow
def test_visits_of_a_tree_search_are_a_column(opened):
    run = traces.run(["a", "b"], visits=[{101: 7, 100: 3}, {132: 10}])
    window = opened(traces.trace(TracedPrompt("", [], [run], method="ppo-mcts", chosen=0)))
    window.token(0, 0).click()
    assert window.page.locator("#table thead th").all_inner_texts()[-1] == "Visits"
    assert [row[1][-1] for row in window.rows()] == ["3", "7", "0", "0"]


@pytest.mark.slow
def test_another_prompt_is_shown_by_its_name(opened):
    window = opened(found())
    assert window.page.locator("#prompts option").all_inner_texts() == [
        "line 7: Search.", "line 8: Other.",
    ]  # fmt: skip
    window.page.locator("#prompts").select_option("1")
    assert window.page.locator(".message .words").all_inner_texts() == ["Other."]
    assert window.page.locator("#search-section").is_hidden()
    assert window.page.locator("article h3").all_inner_texts() == ["response 1"]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_in_light_and_in_dark(opened, scheme):
    """Contrast of each text with what is behind it, by the formula of WCAG."""
    deep = [traces.run([f"t{i}" for i in range(8)], own=own, k=8) for own in (0, 3, 7)]
    trace = traces.trace(TracedPrompt("", [("user", "Hi")], deep, method="cd", chosen=2))
    for each in (trace, pair()):
        window = opened(each, color_scheme=scheme)
        ground = window.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
        assert window.page.evaluate(_CONTRASTS, READABLE) == []
    shades = window.page.evaluate(
        "['low4', 'low1', 'high1', 'high4'].map((name) => { const one = document.createElement("
        "'span'); one.className = name; document.body.append(one); return "
        "getComputedStyle(one).backgroundColor + getComputedStyle(one).borderBottomStyle; })"
    )
    assert len(set(shades)) == 4
    # Signs differ in more than colour.
    assert [each.rsplit(")")[1] for each in shades] == ["dashed", "dashed", "solid", "solid"]


_CONTRASTS = """(least) => {
  const bright = (colour) => {
    const linear = colour.slice(0, 3).map((c) => c / 255)
      .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const read = (text) => text.match(/[\\d.]+/g).map(Number);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = read(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
  };
  const bad = [];
  for (const element of document.querySelectorAll("body *")) {
    if (![...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    if (!element.checkVisibility() || element.closest("svg, script, noscript")) continue;
    const pair = [bright(read(getComputedStyle(element).color)), bright(behind(element))];
    const contrast = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (contrast < least) bad.push([element.className, element.textContent, contrast]);
  }
  return bad;
}"""


def test_hostile_text_is_shown_and_does_nothing(opened):
    window = opened(traces.hostile())
    for prompt in ("0", "1"):
        window.page.locator("#prompts").select_option(prompt)
        assert window.page.title() == "guided-decode trace"
        assert window.page.locator("img, iframe, object, embed, base, link").count() == 0
        assert window.page.locator("script").count() == 2
        words = window.page.locator(".message .words").first
        shown = words.evaluate("(element) => element.textContent")
        for text in traces.HOSTILE[:2] + traces.HOSTILE[3:5]:
            assert text in shown
        for text in ("U+202E", "U+202C", "U+2066", "U+200F", "␀", "␛[31m", "␡", "U+0085", "U+D800",
                     "⇥", "↵", "U+E0041", "U+FEFF", "U+2028", "{{DATA}}{{SCRIPT}}\\u003c\"'`${1}",
                     "\U0001f468\u200d\U0001f469"):  # fmt: skip
            assert text in shown, text
        # What would turn text around or hide in it is nowhere on the page.
        hidden = window.page.evaluate(
            "[...document.body.querySelectorAll('*')].filter((e) => !e.closest('script')).map((e) "
            "=> e.textContent + [...e.attributes].map((a) => a.value)).join('').match("
            "/[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u200e\\u200f\\u202a-\\u202e\\u2060-"
            "\\u206f\\ufeff]|\\p{Cs}/u)"
        )
        assert hidden is None
        window.token(1, 0).click()
        for i in range(1, len(traces.HOSTILE)):
            window.page.keyboard.press(
                "ArrowRight"
                if window.page.locator("[role=listbox][data-run='1']").evaluate(_DIRECTION) == "ltr"
                else "ArrowLeft"
            )
            assert window.selected() == (1, i)
    assert window.page.title() == "guided-decode trace"


@pytest.mark.slow
def test_right_to_left_text_reads_and_moves_from_right_to_left(opened):
    run = traces.run(["\u05e9\u05dc\u05d5\u05dd", " \u05e2\u05d5\u05dc\u05dd", "!"])
    window = opened(traces.trace(TracedPrompt("", [("user", "\u05e9\u05dc\u05d5\u05dd")], [run])))
    first, second = (window.token(0, i).bounding_box() for i in (0, 1))
    assert second["x"] < first["x"]
    window.token(0, 0).click()
    window.page.keyboard.press("ArrowLeft")
    assert window.selected() == (0, 1)
    window.page.keyboard.press("ArrowRight")
    assert window.selected() == (0, 0)
    assert window.page.locator(".message .words").evaluate(_DIRECTION) == "rtl"


def test_a_screen_reader_finds_lists_of_tokens_and_a_table_with_headers(opened):
    window = opened(pair())
    window.token(1, 1).click()
    tree = window.page.locator("body").aria_snapshot()
    for part in (
        '- listbox "Tokens of plain"',
        '- listbox "Tokens of guided"',
        '- option "␣2, advantage −0.290" [selected]',
        '- status: "guided, token 2 of 5: “␣2”, advantage −0.290',
        '- columnheader "Probability"',
        'rowheader "␣2 #132 ✔ taken"',
        'cell "−0.290"',
        'img "Value after each token. plain: from 0.250 to 0.246. guided: from 0.250 to 0.257."',
        '- heading "Candidates" [level=2]',
    ):
        assert part in tree, f"{part} in {tree}"


def test_what_gets_in_all_the_same_may_not_run_or_call(browser, opened, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(page(pair()), encoding="ascii")
    # It says on the console what it refused, and so is not closed as the others are.
    window = Opened(browser, file)
    refused = window.page.evaluate("""async () => {
        const found = [];
        document.addEventListener(
          "securitypolicyviolation", (event) => found.push(event.effectiveDirective));
        const script = document.createElement("script");
        script.textContent = "document.title = 'run'";
        document.body.append(script);
        const image = document.createElement("img");
        image.src = "http://127.0.0.1:9/";
        document.body.append(image);
        document.body.setAttribute("onclick", "document.title = 'run'");
        document.body.click();
        await fetch("http://127.0.0.1:9/").catch(() => null);
        await new Promise((done) => setTimeout(done, 0));
        return found;
    }""")
    assert set(refused) == {"script-src-elem", "img-src", "script-src-attr", "connect-src"}
    assert window.page.title() == "guided-decode trace"
    assert [url for url in window.asked if url.startswith("file:")] == [window.url]
    window.context.close()


@pytest.mark.slow
def test_a_page_of_512_tokens_with_16_candidates_is_at_hand(opened):
    run = traces.run([f" word{i}" for i in range(512)], k=16)
    window = opened(traces.trace(TracedPrompt("", [("user", "hi")], [run])))
    window.token(0, 0).click()
    window.page.keyboard.press("End")
    assert window.selected() == (0, 511)
    assert len(window.rows()) == 16
    # The list scrolls with the selection.
    token = window.token(0, 511).bounding_box()
    frame = window.page.locator("[role=listbox]").bounding_box()
    assert (
        frame["y"] <= token["y"] <= token["y"] + token["height"] <= frame["y"] + frame["height"] + 1
    )


@pytest.mark.slow
def test_the_readmes_pictures_are_made_by_the_command_that_it_names(tmp_path, browser, monkeypatch):
    # Playwright runs once in a thread.
    monkeypatch.setattr(trace_screenshot, "chromium", lambda: nullcontext(browser))
    trace_screenshot.main(tmp_path)
    for name in trace_screenshot.PICTURES.values():
        made, kept = (folder / name for folder in (tmp_path, ROOT / "docs"))
        assert made.read_bytes()[:8] == kept.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert max(made.stat().st_size, kept.stat().st_size) < 250_000
