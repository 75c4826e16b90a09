"""The report in a real headless Chromium, opened from disk, with a text that tries to break out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.report.browser import Browser, find_chromium
from tests.report.sample import LAYOUT, TEXT, head_map, report_data, tokens

from headwise.attend.head_map import HeadMap
from headwise.report.html import compare, write_report

HOSTILE = (
    "<script>alert(1)</script> and </script><script>document.title = 'owned'</script> and "
    "<img src=x onerror=alert(2)> <!-- <b>bold</b> --> &lt;i&gt; {{data}} \u2028 ${1} "
)
CHROMIUM = find_chromium()

# The continuous-integration run fails when these are skipped: .ci/run installs Chromium where none is found.
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="browser test: no chromium or google-chrome on the PATH")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser(CHROMIUM or "") as browser:
        yield browser


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report in which every string that comes from outside holds markup."""
    data = report_data(HOSTILE + TEXT, model="<script>alert(3)</script>")
    data["source"] = data["texts"][0]["name"] = data["notes"][0] = HOSTILE
    data["versions"]["<img src=x onerror=alert(4)>"] = "</script>"
    data["probes"]["induction"]["sentence"] = HOSTILE
    data["probes"]["<img src=x onerror=alert(5)>"] = {**data["probes"]["sink"], "try": f'headwise "{HOSTILE}"'}
    # Whole tags as single tokens, not only in pieces.
    data["texts"][0]["tokens"][1:4] = [" <script>alert(1)</script>", "</script>", " <img src=x onerror=alert(2)>"]
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(data, path)
    return path


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    data: dict[str, Any] = report_data()
    other, _ = head_map(tokens(), seed=1, model="text at step 100")
    probes = {name: probe["scores"] for name, probe in data["probes"].items()}
    this = HeadMap({n: {h: table[str(h)] for h in LAYOUT.heads()} for n, table in probes.items()}, LAYOUT)
    write_report(data | {"comparison": compare(this, other)}, path)
    return path


def choose(browser: Browser, container: str, key: str) -> None:
    browser.point(f"#{container} [data-key={json.dumps(key)}]", click=True)


def text(browser: Browser, selector: str) -> str:
    return browser.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")


def cells(browser: Browser) -> list[str]:
    return browser.evaluate("[...document.querySelectorAll('#map .cell')].map(c => c.dataset.head)")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_from_the_data_runs_or_loads(browser, hostile, dark):
    browser.events.clear()
    browser.open(hostile, dark=dark)
    for key in browser.evaluate("[...document.querySelectorAll('#probes button')].map(b => b.dataset.key)"):
        browser.evaluate(f"document.getElementById({json.dumps('tab-' + key)}).click()")
        browser.evaluate("document.querySelectorAll('#strongest button').forEach(b => b.click())")
    choose(browser, "probes", "induction")
    browser.point("[data-token='1']")
    for mode in ("to", "overall", "from"):
        choose(browser, "mode", mode)

    assert browser.of("Page.javascriptDialogOpening") == []
    assert browser.of("Runtime.exceptionThrown") == []
    assert browser.of("Log.entryAdded") == []  # refusals of the content security policy would stand here
    requests = {event["request"]["url"] for event in browser.of("Network.requestWillBeSent")}
    assert {url for url in requests if not url.startswith("data:")} == {hostile.resolve().as_uri()}
    assert browser.evaluate("document.title") == "<script>alert(3)</script> - headwise"
    assert browser.evaluate("document.querySelectorAll('img, iframe, object, #tokens script, #tokens b').length") == 0
    assert browser.evaluate("document.scripts.length") == 2  # the data and the page's own

    # What could not run is there to read.
    assert text(browser, "#model") == "<script>alert(3)</script>"
    shown = text(browser, "#tokens")
    assert "<script>alert(1)</script></script> <img src=x onerror=alert(2)>" in shown
    assert "{{data}}" in shown and "&lt;i&gt;" in shown


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_map_can_be_switched_sorted_and_hovered(browser, honest, dark):
    browser.events.clear()
    browser.open(honest, dark=dark)
    assert browser.evaluate("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    assert text(browser, "#model") == "text"
    assert len(cells(browser)) == 32
    assert cells(browser) == [str(head) for head in LAYOUT.heads()]
    assert text(browser, "#probe") == "sink"

    choose(browser, "probes", "induction")
    assert text(browser, "#probe") == "induction"
    assert "it continues patterns" in text(browser, "#sentence")
    assert text(browser, "#head") == "Head 2.5"
    assert text(browser, "#tries code").startswith("headwise steer --edit ablate --heads top:induction:4 --prompt ")

    scores = report_data()["probes"]["induction"]["scores"]
    ranked = sorted(scores, key=lambda head: -scores[head])
    choose(browser, "sort", "score")
    assert cells(browser) == ranked
    assert browser.evaluate("[...document.querySelectorAll('#strongest .name')].map(n => n.textContent)") == ranked[:8]

    # The strongest head is the most intense cell: darkest in light colours, lightest in dark ones.
    lightness = browser.evaluate(
        "[...document.querySelectorAll('#map .cell')].map(c => Number(getComputedStyle(c).backgroundColor"
        ".match(/oklab\\(([\\d.]+)/)[1]))"
    )
    assert lightness == sorted(lightness, reverse=dark)
    assert abs(lightness[0] - lightness[-1]) > 0.3

    choose(browser, "sort", "layer")
    assert browser.evaluate("document.getElementById('tip').hidden")
    browser.point('#map [data-head="3.0"]')
    browser.wait("!document.getElementById('tip').hidden")
    assert "Head 3.0" in text(browser, "#tip") and "rank 2 of 32" in text(browser, "#tip")
    browser.point('#map [data-head="3.0"]', click=True)
    assert text(browser, "#head") == "Head 3.0"

    choose(browser, "show", "difference")
    assert "rank correlation" in text(browser, "#compared")
    assert text(browser, "#ranked") == "Largest differences"
    assert browser.of("Runtime.exceptionThrown") == []


def weight(browser: Browser, token: int) -> str:
    return browser.evaluate(f"document.querySelector('[data-token=\"{token}\"]').style.background")


def test_attention_over_the_tokens_follows_the_mouse_and_the_keys(browser, honest):
    browser.open(honest, width=1280, height=1600)
    choose(browser, "probes", "previous")
    assert text(browser, "#head") == "Head 0.1"
    words = tokens()
    assert text(browser, "#tokens").replace("↵", "") == "".join(words)

    at = words.index(" brothe")
    browser.point(f'[data-token="{at}"]')  # the previous-token head looks one back
    browser.wait(f"document.querySelector('.token.from').dataset.token === '{at}'")
    assert text(browser, "#says").startswith("Frombrotheit looks at" + words[at - 1].strip())
    share = int(weight(browser, at - 1).split("%")[0].split()[-1])
    assert share > 50 > int((weight(browser, at - 2) or "0 0%").split("%")[0].split()[-1])
    assert browser.evaluate("document.querySelectorAll('#arcs path').length") >= 1

    browser.point(f'[data-token="{at}"]', click=True)
    browser.point("#head")
    assert browser.evaluate("document.querySelector('.token.from').dataset.token") == str(at)
    browser.evaluate(f"document.querySelector('[data-token=\"{at}\"]').focus()")
    browser.press("ArrowRight", 39)
    browser.wait(f"document.querySelector('.token.from').dataset.token === '{at + 1}'")

    choose(browser, "mode", "to")
    assert "is looked at from" in text(browser, "#says")
    choose(browser, "mode", "overall")
    assert text(browser, "#says").startswith("On average over the text")


def test_the_keyboard_moves_through_probes_and_map(browser, honest):
    browser.open(honest)
    browser.evaluate("document.querySelector('#probes [aria-selected=true]').focus()")
    browser.press("ArrowDown", 40)
    assert text(browser, "#probe") == "previous"
    assert browser.evaluate("document.activeElement.dataset.key") == "previous"
    browser.evaluate("document.querySelector('#map .cell[tabindex=\"0\"]').focus()")
    assert browser.evaluate("document.activeElement.dataset.head") == "0.1"
    browser.press("ArrowDown", 40)
    browser.press("ArrowRight", 39)
    assert browser.evaluate("document.activeElement.dataset.head") == "1.2"
    assert "Head 1.2" in text(browser, "#tip")
    browser.press("Enter", 13)
    assert text(browser, "#head") == "Head 1.2"
    assert browser.evaluate("document.activeElement.dataset.head") == "1.2"


def test_colours_can_be_switched_and_narrow_screens_scroll_only_downwards(browser, honest):
    browser.open(honest, width=360, height=740)
    before = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    browser.point("#theme", click=True)
    assert browser.evaluate("document.documentElement.dataset.theme") == "dark"
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") != before
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360


def test_every_control_has_a_name(browser, honest):
    browser.open(honest)
    nameless = browser.evaluate(
        "[...document.querySelectorAll('button, select, [role=gridcell], [role=button], [role=grid], [role=tab]')]"
        ".filter(e => !(e.ariaLabel || e.labels?.length || e.textContent.trim())).map(e => e.outerHTML)"
    )
    assert nameless == []
    assert browser.evaluate("document.querySelectorAll('#probes [role=tab][aria-selected=true]').length") == 1
