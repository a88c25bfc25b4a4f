"""The page in a real browser: sorting, searching, reading a chart, narrow screens, contrast, paper."""

from __future__ import annotations

import json
import re

import pytest

from tests.support.browser import in_a_browser
from tests.support.pages import edit, saved
from tests.support.report_outputs import curve, sharding, write_curve, write_generations


@in_a_browser
def test_the_page_asks_for_nothing_but_itself_and_complains_of_nothing(root, browser):
    path = saved(root)
    browser.open(path)
    requests = [event["request"]["url"] for event in browser.said("Network.requestWillBeSent")]
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    assert browser.said("Log.entryAdded") == []
    assert browser.said("Runtime.exceptionThrown") == []


COLUMN = "Array.from(document.querySelectorAll('#weights tbody tr'), row => row.cells[{}].textContent.trim())"
SHOWN = "Array.from(document.querySelectorAll('#weights tbody tr')).filter(row => row.checkVisibility())"


@in_a_browser
def test_the_weight_table_sorts_by_size_and_by_name(root, browser):
    browser.open(saved(root))
    heads = browser.run("Array.from(document.querySelectorAll('#weights thead th'), head => head.textContent)")
    original = browser.run(COLUMN.format(0))
    size = heads.index("Bytes")
    click = "document.querySelectorAll('#weights thead button')[{}].click()"
    sort = f"document.querySelectorAll('#weights thead th')[{size}].getAttribute('aria-sort')"

    assert browser.run(sort) == "none"
    browser.run(click.format(size))
    values = browser.run(
        f"Array.from(document.querySelectorAll('#weights tbody tr'), row => Number(row.cells[{size}].dataset.value))"
    )
    assert browser.run(sort) == "descending"
    assert values == sorted((row["bytes"] for row in sharding(tuned=True)["weights"]), reverse=True)
    browser.run(click.format(size))
    assert browser.run(sort) == "ascending"
    assert browser.run(COLUMN.format(size))[0] == "2.50\N{NO-BREAK SPACE}KiB"

    browser.run(click.format(0))
    assert browser.run(sort) == "none"
    assert browser.run(COLUMN.format(0)) == sorted(original, key=lambda name: name.replace("_", " "))


@in_a_browser
def test_the_weight_table_is_sorted_with_the_keyboard_alone(root, browser):
    browser.open(saved(root))
    browser.run("document.querySelector('#filter').focus()")
    for key in ("Tab", "Tab", "Tab", "Enter"):
        text = {"text": "\r"} if key == "Enter" else {}
        code = {"Tab": 9, "Enter": 13}[key]
        browser.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, **text)
        browser.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)
    # Past the search box come the scrolling table, then its headers.
    assert browser.run("document.activeElement.textContent") == "Count"
    assert browser.run("document.activeElement.closest('th').getAttribute('aria-sort')") == "descending"


@in_a_browser
def test_the_weight_table_is_searched_by_words_typed(root, browser):
    browser.open(saved(root))
    rows = len(sharding(tuned=True)["weights"])
    count = "document.querySelector('.search output').textContent"
    assert browser.run(count) == f"{rows} rows"
    browser.run("document.querySelector('#filter').focus()")
    browser.send("Input.insertText", text="LoRA replicated query")
    assert browser.run(count) == f"3 of {rows} rows"
    names = browser.run(SHOWN + ".map(row => row.cells[0].textContent.trim())")
    assert len(names) == 3
    assert all(name.endswith("query/lora_kernel_b") for name in names)
    browser.send("Input.insertText", text=" nowhere")
    assert browser.run(f"{SHOWN}.length") == 0


@in_a_browser
def test_values_are_read_off_a_chart_with_the_arrow_keys_and_the_pointer(root, browser):
    rows = curve()
    write_curve(root, rows)
    browser.open(saved(root))
    said = "document.querySelector('.chart output').textContent"
    plot = "document.querySelector('.chart .plot')"
    browser.run(f"{plot}.focus()")
    for key in ("Home", "ArrowRight", "End"):
        browser.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key)
        step = {"Home": 1, "ArrowRight": 2, "End": len(rows)}[key]
        shown = browser.run(said)
        assert shown.startswith(f"step {step}: each step ")
        value = float(re.search(r"each step ([\d.]+)", shown)[1])
        assert value == pytest.approx(rows[step - 1]["loss"], abs=2e-3)
    assert "validation sequences, during training 3.59" in shown
    browser.run(f"{plot}.scrollIntoView()")
    x, y = browser.run(f"(() => {{ const r = {plot}.getBoundingClientRect(); return [r.x + r.width / 2, r.y + 9] }})()")
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    assert browser.run(said).startswith("step 112: ")


@in_a_browser
def test_values_are_read_off_a_chart_over_batches_at_every_place_of_any_line(root, browser):
    browser.open(saved(root))
    plot = "document.querySelector('#plan .chart .plot')"
    browser.run(f"{plot}.focus()")
    shown = []
    for key in ("Home", "ArrowRight"):
        browser.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key)
        shown.append(browser.run("document.querySelector('#plan .chart output').textContent"))
    assert shown[0] == "4 sequences per batch: (1, 8) auto 6, (2, 4) auto 6, the chip's memory 16"
    assert shown[1] == "8 sequences per batch: (1, 8) auto 10, the chip's memory 16"


@in_a_browser
def test_without_scripts_the_whole_table_is_there_and_no_dead_search_box(root, browser):
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(saved(root))
        assert browser.run(f"{SHOWN}.length") == len(sharding(tuned=True)["weights"])
        assert browser.run("document.querySelector('.search').checkVisibility()") is False
        assert browser.run("document.querySelectorAll('#weights button').length") == 0
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)


@in_a_browser
@pytest.mark.parametrize("shape", [[1, 8], [16, 16], [64, 64]])
def test_the_page_never_scrolls_sideways(root, browser, shape):
    long = "word" * 200
    write_generations(root, "tuned", [("This movie was", long)])
    edit(root, "data/sharding/tuned.json", mesh={"shape": shape, "axis_names": ["batch", "model"], "devices": "tpu"})
    edit(root, "models/preset/manifest.json", handle=long)
    for width in (320, 360, 768, 1280):
        browser.open(saved(root), width=width)
        assert browser.run("document.documentElement.scrollWidth") == width


@in_a_browser
def test_newlines_of_a_generation_are_kept(root, browser):
    browser.open(saved(root))
    shown = browser.run("document.querySelector('.baseline .text').innerText")
    assert shown.splitlines()[:2] == ["1. The Big Lebowski (1998)", "2. Groundhog Day (1993)"]


CONTRAST = """
(selector) => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => {
      const c = part / 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const element = document.querySelector(selector);
  let behind = element;
  while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
  const style = getComputedStyle(element);
  const colour = element instanceof SVGElement ? style.fill : style.color;
  const [low, high] = [light(colour), light(getComputedStyle(behind).backgroundColor)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}
"""


@in_a_browser
@pytest.mark.parametrize("dark", [False, True])
def test_text_has_the_contrast_that_wcag_asks_for_in_light_and_dark(root, browser, dark):
    browser.open(saved(root), dark=dark)
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(16, 22, 21)") is dark
    for selector in ("p", ".note", ".unit", "a", ".change", ".text", ".tag", ".plot + .x-axis text"):
        assert browser.run(f"({CONTRAST})({json.dumps(selector)})") >= 4.5, selector


@in_a_browser
def test_on_paper_the_page_is_light_and_every_column_of_the_weights_fits(root, browser):
    # 186 mm, an A4 page without its margins, at 96 pixels an inch.
    browser.open(saved(root), width=703, media="print", dark=True)
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(251, 252, 252)"
    assert browser.run("document.documentElement.scrollWidth") == 703
    assert browser.run("document.querySelector('.search').checkVisibility()") is False
