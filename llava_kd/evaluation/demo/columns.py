"""Answers side by side, as HTML that loads nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import torch
from PIL import Image
from torch import Tensor

from llava_kd.evaluation.demo.asking import Answer, Look, Token

# Ink and lines are those of the page around, so that light and dark follow it.
CSS = """
.demo{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,250px),1fr));gap:16px;
align-items:start}
.demo section{border:1px solid var(--border-color-primary);border-radius:12px;padding:16px 18px;min-width:0;
background:var(--block-background-fill)}
.demo h3{font-size:15px;margin:0 0 2px;overflow-wrap:anywhere}
.demo .said{font-size:19px;line-height:1.35;margin:0 0 10px;overflow-wrap:anywhere;white-space:pre-wrap}
.demo .note{opacity:.75;font-size:13px;margin:6px 0 10px}
.demo .fault{border-left:3px solid #c0392b;padding-left:10px}
.demo .tokens{line-height:2;margin:0 0 10px;overflow-wrap:anywhere}
.demo .tokens span{border-radius:4px;padding:3px 2px;white-space:pre-wrap}
.demo img{width:100%;max-width:320px;border-radius:8px;display:block;image-rendering:auto}
.demo .rows{max-height:300px;overflow:auto;margin-top:10px}
.demo table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
.demo th,.demo td{padding:4px 6px;border:0 solid var(--border-color-primary)!important;
border-bottom-width:1px!important;text-align:right}
.demo th{font-weight:500;position:sticky;top:0;
background:var(--block-background-fill)}
.demo th:nth-child(odd),.demo td:nth-child(odd){text-align:left;overflow-wrap:anywhere;
font-family:ui-monospace,Menlo,Consolas,monospace}
.demo table{border:0!important}.demo tbody tr:last-child td{border-bottom-width:0!important}
"""
_SIDE = 320  # of a shown picture, in pixels
_HOT = (226, 62, 20)


def columns(answers: Sequence[Answer]) -> str:
    """A column each."""
    return f'<div class="demo">{"".join(map(_column, answers))}</div>'


def heat(picture: Image.Image, look: Look) -> Image.Image:
    """The picture, paler, with red where the answer looked, from its least patch to its strongest."""
    pixels_HWC = _large(picture)
    height, width = pixels_HWC.shape[:2]
    patches_RK = look.patches_RK - look.patches_RK.min()
    shares_RK = patches_RK / patches_RK.max().clamp_min(1e-12)
    strength_HW = torch.nn.functional.interpolate(
        shares_RK[None, None], size=(height, width), mode="bilinear", align_corners=False
    )[0, 0]
    pale_HWC = pixels_HWC.mean(2, keepdim=True) * 0.25 + pixels_HWC * 0.35 + 255 * 0.4
    weight_HW1 = strength_HW.unsqueeze(2) * 0.85
    mixed_HWC = pale_HWC * (1 - weight_HW1) + torch.tensor(_HOT) * weight_HW1
    return Image.fromarray(mixed_HWC.round().byte().numpy())


def _large(picture: Image.Image) -> Tensor:
    """[H, W, 3] of about the size that is shown; small pictures keep their pixels as squares."""
    scale = _SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    kind = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BILINEAR
    raw = torch.frombuffer(bytearray(picture.convert("RGB").resize(size, kind).tobytes()), dtype=torch.uint8)
    return raw.view(size[1], size[0], 3).float()


def _column(answer: Answer) -> str:
    head = f"<section><h3>{escape(answer.name)}</h3>"
    if answer.fault:
        return f'{head}<p class="note fault">{escape(answer.fault)}</p></section>'
    said = escape(answer.text) or '<span class="note">nothing</span>'
    cut = '<p class="note">cut off: more tokens were not allowed</p>' if answer.is_cut else ""
    chips = "".join(map(_chip, answer.tokens))
    return (
        f'{head}<p class="said">{said}</p>{cut}<div class="tokens">{chips}</div>{_map(answer)}'
        f"{_table(answer.tokens)}</section>"
    )


def _chip(token: Token) -> str:
    """The surer, the bluer; what was less than even is orange."""
    sure = token.probability
    colour = f"36,104,201,{0.08 + 0.3 * sure:.2f}" if sure >= 0.5 else f"226,120,20,{0.5 - 0.4 * sure:.2f}"
    told = f"{sure:.1%}, then {token.other} {token.other_probability:.1%}"
    style = f"background:rgba({colour})"
    return f'<span style="{style}" title="{escape(told)}">{escape(token.text)}</span>\u200b'


def _map(answer: Answer) -> str:
    if answer.look is None or answer.seen is None:
        return f'<p class="note">{escape(answer.blind)}</p>'
    buffer = io.BytesIO()
    heat(answer.seen, answer.look).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    patches_RK = answer.look.patches_RK
    ratio = float(patches_RK.max() / patches_RK.mean().clamp_min(1e-12))
    return (
        f'<img alt="where {escape(answer.name)} looked" src="data:image/png;base64,{data}">'
        f'<p class="note">{answer.look.on_picture:.0%} of its attention is on the picture; the strongest '
        f"patch has {ratio:.1f} times the mean</p>"
    )


def _table(tokens: Sequence[Token]) -> str:
    rows = "".join(
        f"<tr><td>{_shown(token.text)}</td><td>{token.probability:.1%}</td>"
        f"<td>{_shown(token.other)}</td><td>{token.other_probability:.1%}</td></tr>"
        for token in tokens
    )
    heads = "<tr><th>token</th><th>prob.</th><th>runner-up</th><th>prob.</th></tr>"
    return f'<div class="rows"><table><thead>{heads}</thead><tbody>{rows}</tbody></table></div>'


def _shown(text: str) -> str:
    """Space at the ends is marked: it tells two tokens apart."""
    return escape(text.replace("\n", "\u21b5").replace(" ", "\u00b7"))
