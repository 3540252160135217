"""`llava-kd recommend`: recipes for a data set, from the runs of the store."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from llava_kd.assembly.searching.describing import data_set_in
from llava_kd.durable import write_text
from llava_kd.search.recommending.ranking import recommend
from llava_kd.search.recommending.words import lines
from llava_kd.search.store.database import Store


def recommend_for(
    data: str, store: Store, *, images: str | None = None, most: int = 5, out: str | None = None
) -> list[str]:
    """What is said; `out` gets all of it as JSON. ValueError for a store that holds too little."""
    entries, data_sets = store.entries(), store.data_sets()
    mine = data_set_in(data, images)
    found = recommend(entries, data_sets, mine.features)
    if out is not None:
        record = {"data": data, "features": mine.features, **dataclasses.asdict(found)}
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(out), json.dumps(record, indent=1, default=str) + "\n")
    return lines(found, most)
