"""The page is one file that loads nothing and runs nothing but its own, whatever a review says."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

from stages.core.report import page as report
from tests.support.browser import in_a_browser
from tests.support.pages import Reader, edit, rendered, saved
from tests.support.report_outputs import GENERATIONS, plan, sharding, write_generations, write_json, write_samples

ATTACK = '<script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'">'


def test_nothing_in_the_page_refers_to_another_file(root):
    page = Reader(rendered(root))
    links = []
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            if tag == "a" and name == "href":
                links.append(value)
            elif name in ("href", "src", "srcset", "xlink:href", "action", "data", "poster"):
                assert value == "data:,", (tag, name, value)
            else:
                assert "//" not in (value or ""), (tag, name, value)
    assert [link for link in links if not link.startswith("#")] == ["https://ai.google.dev/gemma/terms"]
    for text in page.inline["style"] + page.inline["script"]:
        assert "//" not in re.sub(r"^\s*// .*$", "", text, flags=re.MULTILINE)
        assert "@import" not in text
        assert "url(" not in text


def test_the_policy_allows_the_inline_style_and_script_by_their_hashes_and_nothing_else(root):
    page = Reader(rendered(root))
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["base-uri"] == directives["form-action"] == "'none'"
    for name in ("style", "script"):
        assert len(page.inline[name]) == 1
        digest = base64.b64encode(hashlib.sha256(page.inline[name][0].encode()).digest()).decode()
        assert directives[f"{name}-src"] == f"'sha256-{digest}'"
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name == "style" or name.startswith("on")], tag


def attack_everywhere(root: Path) -> None:
    """Put the attack into every text that comes from a model, a review, a user or a server."""
    for variant in GENERATIONS:
        write_generations(root, variant, [(ATTACK + " prompt", ATTACK + variant)])
    write_samples(root, [(1, ATTACK, ATTACK)])
    for name in ("base", "tuned"):
        content = sharding(tuned=name == "tuned")
        content |= {"layout": ATTACK, "dtype": ATTACK, "preset": ATTACK}
        content["mesh"] |= {"axis_names": [ATTACK, "model" + ATTACK], "devices": ATTACK}
        content["weights"][0] |= {"pattern": ATTACK, "rule": ATTACK, "dtype": ATTACK, "kind": ATTACK, "spec": [ATTACK]}
        content["by_kind"][ATTACK] = 2**20
        content["fallbacks"] = [dict.fromkeys(("pattern", "wanted", "used", "reason"), ATTACK)]
        write_json(root / f"data/sharding/{name}.json", content)
    planned = plan()
    target, candidate = planned["targets"]["too large"], planned["search"]["candidates"][2]
    target |= {"topology": ATTACK, "collectives": {ATTACK: {"count": 1, "bytes": 1}}, "bound_by": ATTACK}
    target |= {"largest": [{"bytes": 1, "shape": ATTACK, "operator": ATTACK}], "step_seconds_lower_bound": 1.0}
    candidate |= {"name": ATTACK, "reason": ATTACK}
    planned["search"] |= {"preset": ATTACK, "topology": ATTACK}
    for row in [*planned["search"]["points"], *planned["scaling"]["rows"]]:
        row |= {"name": ATTACK, "topology": ATTACK}
    write_json(root / "data/sharding/plan.json", {**planned, "targets": {ATTACK: target}})
    bad = {"name": ATTACK, "url": "javascript:document.title='owned'"}
    files = [{"name": ATTACK, "size": 1, "sha256": ATTACK}]
    edit(root, "models/preset/manifest.json", preset=ATTACK, source=ATTACK, handle=ATTACK, license=bad, files=files)


def test_text_from_outside_never_becomes_an_element(root):
    attack_everywhere(root)
    page = rendered(root, "generate.prompts=" + json.dumps([ATTACK]), "prepare.text_column=" + json.dumps(ATTACK))
    reader = Reader(page)
    tags = [tag for tag, _ in reader.elements]
    assert tags.count("script") == tags.count("style") == 1
    assert "img" not in tags
    assert not [a["href"] for tag, a in reader.elements if tag == "a" and not a["href"].startswith("#")]
    assert reader.text.count("<script>document.title") > 20


@in_a_browser
def test_an_attack_in_every_text_is_inert_in_a_browser(root, browser):
    attack_everywhere(root)
    browser.open(saved(root))
    assert browser.run("document.title") == f"{ATTACK} \N{MIDDLE DOT} fine-tuning report"
    assert browser.run("document.querySelectorAll('img, main script').length") == 0
    assert ATTACK in browser.run("document.querySelector('.text').textContent")
    assert browser.said("Log.entryAdded") == []


@in_a_browser
def test_what_is_put_into_the_page_afterwards_does_not_run_either(root, browser):
    path = saved(root)
    path.write_text(path.read_text(encoding="utf-8").replace("</main>", f"{ATTACK}</main>"), encoding="utf-8")
    browser.open(path)
    blocked = [entry["entry"]["text"] for entry in browser.said("Log.entryAdded")]
    assert browser.run("document.title") == "gemma3_270m \N{MIDDLE DOT} fine-tuning report"
    assert any("Content Security Policy" in text for text in blocked)


def test_control_characters_and_half_a_surrogate_pair_are_shown_not_swallowed(root):
    path = root / "data/generated/tuned.jsonl"
    path.write_text('{"prompt": "p", "text": "a\\u0000b\\u001bc\\r\\nd\\rx"}\n', encoding="utf-8")
    assert "a\u2400b\u241bc\nd\u240dx" in rendered(root)
    assert report.clean("a\ud800b") == "a\N{REPLACEMENT CHARACTER}b"
