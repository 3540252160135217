"""The pages of `llava-kd report` in a real browser: narrow and wide, light and dark, by keys alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import Page, browser, needs_chromium
from PIL import Image
from test_evaluation_report import write_log, write_model
from test_evaluation_report_runs import write_run

from llava_kd.cli import main
from llava_kd.evaluation.report.page import TOKENS

pytestmark = [pytest.mark.slow, needs_chromium]
NAME = "stage3_of_a_run_with_a_long_name"


def comparison(folder: Path) -> Path:
    folder.mkdir()
    Image.new("RGB", (48, 40), (200, 30, 30)).save(folder / "a.png")
    write_model(folder / "teacher" / "eval", "11111110", str(folder / "a.png"))
    for seed in (0, 1):
        for arm, answers in (("plain", "10100000"), ("kd", "11110000")):
            write_model(folder / f"seed{seed}" / arm / "eval", answers, str(folder / "a.png"))
            terms = ("cross_entropy", *((*TOKENS, "relation") if arm == "kd" else ()))
            for stage in ("stage1", "stage2", "stage3"):
                write_log(folder / f"seed{seed}" / arm / stage, terms)
    assert main(["report", str(folder)]) == 0
    return folder / "report.html"


def several_runs(folder: Path) -> Path:
    for k in range(9):  # one more than there are colours
        more = {"seconds_per_step": 0.4, "data_wait_share": 0.1, "peak_memory_gb": 70.5, "slice/held": 0.5}
        run = write_run(folder / f"arm{k}" / NAME, weight=1 + k / 10, **more)
        write_model(run / "eval", "1100", str(folder / "none.png"))
    assert main(["report", str(folder), f"--out={folder / 'runs.html'}"]) == 0
    return folder / "runs.html"


@pytest.mark.parametrize("make", [comparison, several_runs], ids=lambda make: make.__name__)
def test_a_page_is_read_narrow_and_wide_light_and_dark(make, tmp_path: Path) -> None:
    made = make(tmp_path / "runs")
    with browser(tmp_path / "browser") as page:
        for width in (390, 1280):
            for dark in (False, True):
                page.open(f"file://{made}", width=width, dark=dark)
                found = page.check()
                assert found.pop("read")[0] > 100
                assert not any(found.values()), (width, dark, found)
                page.picture(tmp_path / f"{width}_{'dark' if dark else 'light'}.png")  # to be looked at


def test_runs_are_hidden_by_keys_and_every_stop_of_the_keys_shows(tmp_path: Path) -> None:
    made = several_runs(tmp_path / "runs")
    stop = """(() => {
      const at = document.activeElement, style = getComputedStyle(at);
      return [at.tagName, style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2];
    })()"""
    count = "[...document.querySelectorAll('svg .{}')].filter((curve) => curve.checkVisibility()).length"
    with browser(tmp_path / "browser") as page:
        page.open(f"file://{made}", width=1280)
        tags: list[str] = []
        while (found := next_stop(page, stop))[0] != "BODY":
            assert found[1], f"nothing shows the focus of stop {len(tags)}, a {found[0]}"
            tags.append(found[0])
            if found[0] == "INPUT" and tags.count("INPUT") == 2:
                before = page.evaluate(count.format("curve"))
                page.press(" ")
                assert page.evaluate(count.format("only1")) == 0
                assert page.evaluate(count.format("curve")) * 9 == before * 8
        assert tags.count("INPUT") == tags.count("SUMMARY") == 9
        assert tags.count("DIV") >= 3  # the tables that may scroll


def next_stop(page: Page, stop: str) -> tuple[str, bool]:
    page.press("Tab")
    tag, is_shown = page.evaluate(stop)
    return tag, is_shown
