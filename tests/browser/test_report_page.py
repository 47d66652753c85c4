"""The page in a real browser: no console message, and its search, sorting and CSV work."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fixtures.summary_example import example_summary
from palimpsest.report import write_report
from palimpsest.summary import Summary

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage "
    "--enable-logging=stderr --virtual-time-budget=3000 --dump-dom"
).split()

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

DRIVE = """
<script>
const made = [];
URL.createObjectURL = (blob) => { made.push(blob); return "#"; };
const say = (name, value) => document.body.setAttribute("data-" + name, value);
const search = document.getElementById("search");
search.value = "rmu base64";
search.dispatchEvent(new Event("input"));
say("count", document.getElementById("count").textContent);
const button = [...document.querySelectorAll("#all-rows th button")]
  .find((b) => b.textContent === "value");
button.click();
const shown = [...document.querySelectorAll("#all-rows tbody tr")].filter((r) => !r.hidden);
say("sorted", shown.map((r) => r.querySelector("td[data-v]").dataset.v).join(" "));
document.getElementById("csv").click();
made[0].text().then((text) => say("csv", text));
document.querySelector("svg .point").dispatchEvent(new Event("focusin", { bubbles: true }));
say("linked", document.querySelectorAll("tr[data-m].on").length);
</script></body>
"""

MEASURE = """
<script>
const broken = [];
for (const name of document.querySelectorAll("th .model > span:last-child")) {
  for (const found of name.textContent.matchAll(/[^\\s-]+/g)) {
    const range = document.createRange();
    range.setStart(name.firstChild, found.index);
    range.setEnd(name.firstChild, found.index + found[0].length);
    const tops = new Set([...range.getClientRects()].map((r) => Math.round(r.top)));
    if (tops.size > 1) broken.push(found[0]);
  }
}
document.body.setAttribute("data-width", innerWidth);
document.body.setAttribute("data-broken", broken.join(" "));
</script></body>
"""


def _open(page: Path, profile: Path, *more: str) -> tuple[str, list[str]]:
    """Return the page's DOM after its scripts ran, and its console messages."""
    done = subprocess.run(
        [str(CHROMIUM), *FLAGS, *more, f"--user-data-dir={profile}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_the_page_opens_without_a_console_message(tmp_path: Path) -> None:
    page = write_report(example_summary(), tmp_path / "report.html")
    dom, messages = _open(page, tmp_path / "profile")
    assert messages == []
    total = len(example_summary().rows)
    assert f">{total} of {total} rows</span>" in dom


def test_the_policy_stops_a_script_that_is_not_ours(tmp_path: Path) -> None:
    page = write_report(example_summary(), tmp_path / "report.html")
    alien = "<script>document.body.setAttribute('data-alien', '1')</script></body>"
    page.write_text(page.read_text().replace("</body>", alien))
    dom, messages = _open(page, tmp_path / "profile")
    assert 'data-alien="' not in dom
    assert any("Content Security Policy" in line for line in messages)


@pytest.mark.parametrize("width", [500, 1280])
def test_model_names_break_inside_no_word(tmp_path: Path, width: int) -> None:
    data = example_summary().model_dump_json()
    for name, longer in (("never-trained", "counterfactual"), ("graddiff", "grad_ascent")):
        data = data.replace(f'"{name}"', f'"{longer}"')
    page = write_report(Summary.model_validate_json(data), tmp_path / "report.html")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    page.write_text(text.replace("</body>", MEASURE))
    dom, _ = _open(page, tmp_path / "profile", f"--window-size={width},900")
    assert f'data-width="{width}"' in dom
    assert 'data-broken=""' in dom


def test_search_sorting_csv_and_linked_highlighting_work(tmp_path: Path) -> None:
    page = write_report(example_summary(), tmp_path / "report.html")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    page.write_text(text.replace("</body>", DRIVE))
    dom, messages = _open(page, tmp_path / "profile")
    assert messages == []
    body = re.search(r"<body([^>]*)>", dom)
    assert body is not None
    said = dict(re.findall(r'data-(\w+)="([^"]*)"', body[1]))
    wanted = [r for r in example_summary().rows if (r.model, r.transform) == ("rmu", "base64")]
    assert said["count"] == f"{len(wanted)} of {len(example_summary().rows)} rows"
    values = [float(v) for v in said["sorted"].split()]
    assert values == sorted(r.value for r in wanted if r.value is not None)
    lines = html.unescape(said["csv"]).strip().splitlines()
    assert len(lines) == len(wanted) + 1
    assert lines[0].startswith('"model","evaluation","transform"')
    assert int(said["linked"]) >= 2
