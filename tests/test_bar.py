"""The bar of a long loop: carriage returns on a terminal alone, a line every 10 s elsewhere."""

from __future__ import annotations

import io

import pytest

import llava_kd.bar
from llava_kd.bar import Bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_shown", [True, False])
def test_a_log_file_gets_a_line_every_ten_seconds_and_no_carriage_return(
    is_shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(llava_kd.bar, "monotonic", lambda: now)
    log = io.StringIO()
    with Bar(200, "drawing shapes", "images", is_shown=is_shown, stream=log) as bar:
        for _ in range(200):
            now += 0.125  # exact in binary
            bar.advance()
    lines = [f"drawing shapes: {done} of 200 images" for done in (80, 160)]
    assert "\r" not in log.getvalue()
    assert log.getvalue().splitlines() == (lines if is_shown else [])


def test_a_terminal_gets_a_bar_that_is_whole_at_the_end() -> None:
    terminal = Terminal()
    with Bar(2, "drawing shapes", "images", stream=terminal) as bar:
        bar.advance()
        bar.advance()
    assert "\r" in terminal.getvalue()
    assert "100%" in terminal.getvalue()
    assert "2/2" in terminal.getvalue()
