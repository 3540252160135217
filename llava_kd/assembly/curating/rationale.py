"""`llava-kd data rationale`: a model answers step by step, and what evidence bears out becomes records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from llava_kd.assembly.curating.answer import Answering, Run, elicit
from llava_kd.curation.elicit.making import Made
from llava_kd.curation.rationale.evidence import Checks, Evidence
from llava_kd.curation.rationale.passages import read_passages
from llava_kd.curation.rationale.scenes import read_boxes, read_scene_graphs
from llava_kd.curation.rationale.verifying import Answers, Rules, rationales
from llava_kd.curation.rationale.words import read_facts, read_written_words
from llava_kd.evaluation.answers import claim
from llava_kd.evaluation.generation.questions import Question

READERS = {
    "scene_graphs": read_scene_graphs,
    "boxes": read_boxes,
    "ocr": read_written_words,
    "facts": read_facts,
    "texts": read_passages,
}  # in the order in which they are asked


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Files of evidence, and a folder of texts; what is None is not asked."""

    scene_graphs: str | None = None
    boxes: str | None = None
    ocr: str | None = None
    facts: str | None = None
    texts: str | None = None

    def read(self) -> Checks:
        given = {kind: getattr(self, kind) for kind in READERS}
        evidence = [READERS[kind](path) for kind, path in given.items() if path is not None]
        return Checks(cast(Sequence[Evidence], evidence))


def rationale_data(asked: Answering, sources: Sources, rules: Rules) -> str:
    """Stepwise answers to the last question of every record, verified; what to say of them."""
    checks = sources.read()

    def work(run: Run) -> tuple[Made, Mapping[str, object]]:
        records, unusable = run.read("last")
        checks.check_records([one.record for one in records], asked.data)
        with run.world.together():
            if run.world.is_main:
                claim(run.out / "checks", {"evidence": checks.fingerprint, **_identity(rules)})
        asking = run.asking(asked.model)

        def answers(questions: Sequence[Question], number: int) -> Answers:
            return asking.answers(questions, run.out / f"answers{number}")

        origin = {
            **asking.provenance("rationale", "the records' own questions"),
            "evidence": checks.fingerprint,
            "rules": {"rounds": rules.rounds, "unread": rules.unread, "true_answers": rules.true_answers},
        }
        made = rationales(answers, records, checks, rules, is_greedy=asking.writing.is_greedy, origin=origin)
        made = Made(entries=made.entries, dropped=[*unusable, *made.dropped])
        return made, {**origin, **_counts(made)}

    return elicit(asked, work)


def _identity(rules: Rules) -> dict[str, str | int]:
    """What decides the records beside model, data and writing."""
    return {
        "rounds": rules.rounds,
        "unread": rules.unread,
        "true_answers": int(rules.true_answers),
        "answer": rules.answer,
        "prompt": rules.prompt,
    }


def _counts(made: Made) -> dict[str, object]:
    told = [cast(Mapping, entry["elicited"]) for entry in made.entries]
    by = Counter(str(one["by"]) for record in told for one in record["corrections"])
    return {
        "steps": sum(record["steps"] for record in told),
        "unverified steps": sum(record["unverified"] for record in told),
        "corrected records": sum(bool(record["corrections"]) for record in told),
        "corrections": dict(by),
    }
