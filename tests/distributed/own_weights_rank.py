"""One rank of `llava-kd` whose table holds one more term; started by test_own_weights.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from extra_terms import Mapped

from llava_kd.assembly import settings
from llava_kd.cli import main
from llava_kd.distill.terms import TERMS

if __name__ == "__main__":
    settings.TERMS = {**TERMS, "mapped": Mapped}
    sys.exit(main(sys.argv[1:]))
