"""What the pages of reports share: their style, their script, and the parts that hold charts and tables."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape

from layerwise.files.run_files import MARK

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --soft: #59636e; --line: #d5d9de; --tint: #f3f5f7;
        --first: #0072b2; --second: #b34700; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16191d; --ink: #e4e7eb; --soft: #a2abb5; --line: #3b4148; --tint: #1f242a; --first: #56b4e9;
          --second: #e69f00; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 64rem; background: var(--paper); color: var(--ink);
       font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; margin: 0; line-height: 1.25; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .5rem; }
h3 { font-size: 1rem; margin: .4rem 0 .1rem; }
p { margin: .4rem 0; max-width: 46rem; }
.soft { color: var(--soft); }
.lead { font-size: 1.15rem; margin: .8rem 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); gap: .75rem;
         margin: 1.5rem 0 0; }
.facts div { background: var(--tint); border-radius: .5rem; padding: .8rem 1rem; }
.facts b { display: block; font-size: 1.55rem; line-height: 1.3; color: var(--first); }
.note { border-left: 4px solid var(--first); background: var(--tint); padding: .5rem .9rem; margin: .6rem 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: .5rem 1.5rem; }
.panels > figure { margin: 0; max-width: 32rem; }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
.bar { width: 50%; } .bar i { display: block; height: 1.2em; background: var(--first); }
.keys span { margin-right: 1.1em; white-space: nowrap; }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; min-width: 50%; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .38rem .8rem; border-bottom: 1px solid var(--line); vertical-align: top;
         white-space: nowrap; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.words th, .words td { text-align: left; overflow-wrap: anywhere; white-space: normal; }
.words td + td { font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
button { font: inherit; color: var(--ink); background: var(--tint); border: 1px solid var(--line); margin: .15rem;
         border-radius: .4rem; padding: .15rem .6rem; cursor: pointer; }
button[aria-pressed=false] { color: var(--soft); text-decoration: line-through; }
#told { position: fixed; display: none; z-index: 1; white-space: pre; pointer-events: none; background: var(--paper);
        border: 1px solid var(--line); border-radius: .4rem; padding: .3rem .6rem; font-size: .85rem; }
pre { background: var(--tint); padding: .7rem 1rem; border-radius: .4rem; white-space: pre-wrap; }
summary { cursor: pointer; margin: .8rem 0; }
@media print { body { max-width: none; } button { display: none; } }
"""
SCRIPT = """
const told = document.getElementById('told');
for (const picture of document.querySelectorAll('svg[data-hover]')) {
  const points = JSON.parse(picture.dataset.hover);
  picture.addEventListener('pointermove', event => {
    const box = picture.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * picture.viewBox.baseVal.width;
    const near = points.reduce((best, one) => Math.abs(one[0] - x) < Math.abs(best[0] - x) ? one : best);
    told.textContent = near[1];
    told.style.display = 'block';
    const left = Math.min(event.clientX + 14, document.documentElement.clientWidth - told.offsetWidth - 8);
    told.style.left = Math.max(left, 8) + 'px';
    told.style.top = Math.max(event.clientY - told.offsetHeight - 12, 8) + 'px';
  });
  picture.addEventListener('pointerleave', () => { told.style.display = 'none'; });
}
for (const button of document.querySelectorAll('button[data-toggle]')) {
  button.addEventListener('click', () => {
    const shown = button.getAttribute('aria-pressed') !== 'true';
    button.setAttribute('aria-pressed', shown);
    for (const part of document.querySelectorAll('[data-module="' + button.dataset.toggle + '"]')) part.hidden = !shown;
  });
}
"""
WIDTH, HEIGHT = 360.0, 220.0


def page(title: str, parts: Sequence[str]) -> str:
    """A page of these parts, in one style, which nothing can be loaded into, whatever a name in the data tries."""
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script}'"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{MARK.decode()}\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + f'\n<div id="told" role="status"></div>\n<script>{SCRIPT}</script>\n</body>\n</html>\n'
    )


def panel(title: str, picture: str, module: int | None = None) -> str:
    """A chart with its title; hidden with its module, where it is of one."""
    of = "" if module is None else f' data-module="{module}"'
    return f"<figure{of}><h3>{escape(title)}</h3>{picture}</figure>"


def keys(names: Mapping[str, str]) -> str:
    """What the colours mean."""
    keys = (f'<span><i class="key" style="background:{c}"></i>{escape(name)}</span>' for name, c in names.items())
    return f'<p class="keys">{"".join(keys)}</p>'


def dot(x: float, y: float, colour: str, radius: float = 4.5) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{colour}" stroke="var(--paper)"/>'


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table that scrolls by itself where the page is narrow; `kind` "words" for one of text."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
