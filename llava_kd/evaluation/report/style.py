"""The style sheet of the report: nothing is loaded, light and dark follow the reader's setting."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

CSS = """
:root{color-scheme:light dark;--bg:#fbfaf8;--card:#fff;--ink:#1c1f23;--soft:#5d646e;--line:#e4e1db;
--teacher:#6b717b;
--baseline:#b45f06;--distilled:#2468c9;--good:#1d7f4e;--bad:#b8372f;--wash:#eef4fc;
--run0:#2468c9;--run1:#b45f06;--run2:#1d7f4e;--run3:#8e3db8;--run4:#b8372f;--run5:#0b7a8a;--run6:#7a6a00;--run7:#5d646e}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--card:#1c2026;--ink:#e9eaec;--soft:#9aa2ad;
--line:#2e343c;
--teacher:#a3aab5;--baseline:#f0a04b;--distilled:#6aa8ff;--good:#56c98c;--bad:#f0796f;--wash:#1b2738;
--run0:#6aa8ff;--run1:#f0a04b;--run2:#56c98c;--run3:#c98af0;--run4:#f0796f;--run5:#4fc6d6;--run6:#d6c24a;--run7:#a3aab5}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1080px;margin:0 auto;padding:48px 28px 72px}
h1{font-size:30px;line-height:1.2;letter-spacing:-.02em;margin:0 0 10px;font-weight:680}
h2{font-size:20px;letter-spacing:-.01em;margin:54px 0 6px;font-weight:650}
h3{font-size:14px;margin:0;font-weight:600}
p{margin:0 0 16px;max-width:72ch}.lead{font-size:17px;color:var(--soft)}.lead b{color:var(--ink)}
.note{color:var(--soft);font-size:14.5px}
.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:14px;margin:26px 0 10px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px}
.tile small{display:block;color:var(--soft);font-size:13.5px}
.tile strong{display:block;font-size:38px;line-height:1.15;letter-spacing:-.03em;font-weight:660}
.tile.teacher strong{color:var(--teacher)}.tile.baseline strong{color:var(--baseline)}
.tile.distilled strong{color:var(--distilled)}.tile.gain{background:var(--wash)}
.legend{display:flex;flex-wrap:wrap;gap:6px 22px;margin:8px 0 14px;font-size:14px;color:var(--soft)}
.legend span::before,.legend label::before{content:"";display:inline-block;width:11px;height:11px;
border-radius:50%;margin-right:8px}
.legend .teacher::before{background:var(--teacher)}.legend .baseline::before{background:var(--baseline)}
.legend .distilled::before{background:var(--distilled)}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px;
overflow-x:auto}
.narrow{max-width:620px}.pair{display:grid;grid-template-columns:9fr 10fr;gap:14px;align-items:stretch}
table{border-collapse:collapse;width:100%;font-size:14.5px}
th,td{text-align:right;padding:7px 8px;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}td:last-child,th:last-child{padding-right:0}
th{color:var(--soft);font-weight:550;font-size:13px;vertical-align:bottom}
tr:last-child td,tbody tr:last-child th{border-bottom:0}tr.total>*{font-weight:650}
td.up{color:var(--good)}td.down{color:var(--bad)}
.curves{display:grid;gap:8px 18px}
.curves .head{font-size:13.5px;color:var(--soft);padding-left:42px}.curves .head b{color:var(--ink)}
.curves .term{grid-column:1/-1;font-size:14px;font-weight:600;margin-top:12px}
.curves .term small{font-weight:400;color:var(--soft);margin-left:8px;font-size:13px}
.curves .none{color:var(--soft);font-size:13px;display:grid;place-items:center;
border:1px dashed var(--line);
border-radius:8px;min-height:60px}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font:11px system-ui,sans-serif;fill:var(--soft)}svg text.row{font-size:13.5px;fill:var(--ink)}
svg .grid{stroke:var(--line);stroke-width:1}svg .span{stroke:var(--line);stroke-width:5;
stroke-linecap:round}
svg .curve{fill:none;stroke-width:1.7;stroke-linejoin:round;opacity:.9}
svg .curve.teacher{stroke:var(--teacher)}svg .curve.baseline{stroke:var(--baseline)}
svg .curve.distilled{stroke:var(--distilled)}
svg .dot{stroke:var(--card);stroke-width:2}svg .dot.teacher{fill:var(--teacher)}
svg .dot.baseline{fill:var(--baseline)}svg .dot.distilled{fill:var(--distilled)}
.charts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:18px 24px}
.charts .what{font-size:14px;font-weight:600}.charts .what small{font-weight:400;color:var(--soft);
margin-left:8px;font-size:13px}
tbody th{color:var(--ink);font-size:14px;font-weight:500}
table.words td{white-space:normal;overflow-wrap:anywhere}
.examples{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:14px}
.example{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px;display:flex;
gap:14px}
.example img{width:112px;height:112px;object-fit:contain;border-radius:6px;flex:none;background:var(--bg);
border:1px solid var(--line)}
.shots{display:flex;flex-direction:column;gap:6px;flex:none!important}
.shots img:not(:only-child){width:84px;height:84px}
.example img.tiny{image-rendering:pixelated}
.example p{margin:0 0 8px;font-size:14.5px;line-height:1.35;font-weight:550;overflow-wrap:anywhere}
.example>div{min-width:0;flex:1}
.example dl{margin:0;display:grid;grid-template-columns:minmax(0,max-content) minmax(40%,1fr);
gap:1px 9px;font-size:13.5px}
.example dd::before{display:inline-block;width:17px;text-indent:0;content:""}
.example dt{color:var(--soft);overflow-wrap:anywhere}
.example dd{margin:0;padding-left:17px;text-indent:-17px;overflow-wrap:anywhere}
.example dd.right::before{content:"\\2713";color:var(--good);font-weight:700}
.example dd.wrong::before{content:"\\2717";color:var(--bad);font-weight:700}
fieldset{border:0;padding:0;margin:8px 0 14px;min-width:0}fieldset legend{padding:0 0 4px;width:100%}
.legend label{overflow-wrap:anywhere;cursor:pointer}
.legend input{margin:0 4px 0 0;accent-color:var(--distilled)}
:focus-visible{outline:3px solid var(--distilled);outline-offset:2px;border-radius:4px}
details{margin-top:12px}summary{cursor:pointer;color:var(--soft);font-size:14.5px}
pre{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;
overflow-wrap:anywhere}
.facts td{white-space:normal;text-align:left;vertical-align:top}.facts th{color:var(--soft);font-weight:400;
width:40%;white-space:normal}
@media(max-width:860px){.tiles{grid-template-columns:1fr 1fr}
.pair,.examples,.charts{grid-template-columns:minmax(0,1fr)}
main{padding:28px 16px 48px}.card{padding:16px 14px}
.curves{grid-template-columns:1fr!important}.curves .head,.curves .none{display:none}
.curves .chart::before{content:attr(data-stage) ", optimiser steps";font-size:13.5px;color:var(--soft)}}
@media(max-width:520px){table{font-size:13px}th{font-size:12px}th,td{padding:7px 4px}
.pair thead th{white-space:normal}tbody th{white-space:normal;overflow-wrap:anywhere;min-width:7em}
.pair svg text{font-size:15px}.pair svg text.row{font-size:16px}
.tile{padding:14px 12px}.tile strong{font-size:31px}}
@media print{body{background:#fff}.card,.tile,.example{break-inside:avoid}}
"""
# Lines of a page of any runs, in the order in which they are named.
CSS += "".join(
    f".legend .run{k}::before{{background:var(--run{k})}}svg .curve.run{k}{{stroke:var(--run{k})}}"
    for k in range(8)
)


def html_page(title: str, sections: Sequence[str], *, more_css: str = "") -> str:
    """A whole page of sections, which are HTML already; `title` is text."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}{more_css}</style></head><body><main>"
        f"{''.join(sections)}</main></body></html>\n"
    )
