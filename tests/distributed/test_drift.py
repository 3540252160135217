"""Ranks that no longer hold the same weights are stopped at the next checkpoint, which would hide it."""

from __future__ import annotations

from pathlib import Path

import drift
import pytest
import ranks

pytestmark = pytest.mark.distributed

PART = "multi_modal_projector.linear_1.weight"
EVERY = {"max_steps": 4, "checkpoint": {"every": 2, "keep": 2}}


def test_a_flipped_bit_on_one_rank_is_named_at_the_next_checkpoint(stage, tmp_path: Path) -> None:
    """Under DDP; ZeRO-1 and 2 overwrite it at the next update."""
    config = stage("run", **EVERY)
    words = ["train", str(config), *ranks.ENGINES["ddp"]]
    planted = ["1", "3", PART, *words]
    ended = ranks.Ranks(planted, tmp_path / "logs", ranks=2, function=drift.train_drifting).wait()
    assert ended.codes == (2, 2), ended.log
    for log in ended.logs:
        assert "the ranks' trained weights must be the same" in log
        assert "rank 1 in " in log
        assert PART in log
        assert "Traceback" not in log
    output = config.with_suffix("")
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000002"]
    ended = ranks.Ranks(words, tmp_path / "logs", ranks=2).wait()
    assert ended.codes == (0, 0), ended.log
    assert "resuming from step 2" in ended.logs[0]
