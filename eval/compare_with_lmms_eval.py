"""Where our scorers and lmms-eval's task code read an answer differently.

Run with the Python of an environment that has lmms-eval (see README.md) and this repository on PYTHONPATH:

    PYTHONPATH=. /path/to/lmms/bin/python eval/compare_with_lmms_eval.py

Both judge the same answers: hand-written ones in every manner that models answer, and drawn mixtures of
them. One line per benchmark, and the first differences. docs/evaluation.md explains each.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator
from lmms_eval.tasks.mme import utils as lmms_mme
from lmms_eval.tasks.mmmu import utils as lmms_mmmu
from lmms_eval.tasks.pope import utils as lmms_pope
from lmms_eval.tasks.scienceqa import utils as lmms_sqa
from lmms_eval.tasks.textvqa import utils as lmms_textvqa
from lmms_eval.tasks.vizwiz_vqa import utils as lmms_vizwiz
from lmms_eval.tasks.vqav2 import utils as lmms_vqav2

from llava_kd.evaluation.scorers.choice import mmbench_option, mmmu_choice, scienceqa_option
from llava_kd.evaluation.scorers.open_answer import is_open_correct
from llava_kd.evaluation.scorers.vqa_text import textvqa_accuracy, vizwiz_accuracy, vqa_accuracy
from llava_kd.evaluation.scorers.yes_no import mme_reading, pope_says_yes

SHORT = (
    "yes", "Yes", "Yes.", "no", "No.", "none", "2", "two", "Two cats", "a cat", "the red bus", "red,white",
    "1,000", "1000", "5.", "3:18", "mcdonald's", "McDonald's", "dont know", "don't know", "t-shirt", "10-2",
    "unanswerable", "Unanswerable.", "coke!", "U.S.A.", "what's up", "", "left / right", "\u201cstop\u201d",
)  # fmt: skip
YES_NO = (
    "Yes", "yes", "Yes.", "Yes, it is.", "No", "no", "No.", "No, there is not.", "NO", "no\n",
    "There is no dog.", "not", "unknown", "nothing", "", "y", "n", "Well, yes", " Yes", "Not yes.",
    "It is not.", "nope", "None.",
)  # fmt: skip
LETTERS = (
    "A", "B", "B.", "b", "(B)", "B. dog", "(B) dog", "The answer is B.", "The answer is B", "dog", "Dog.",
    "a cat", "B.x", "", "A or B", "I think B", "B\u3002", "\u9009B", "It is a dog, not a cat.", "D", "E",
    " B", "B\n", "A dog is what I see here", "answer: B", "The correct option is (B), a dog.",
)  # fmt: skip
OPEN = (
    "0.96", "0.956", "The answer is 0.96.", "x = 1,000", "1000", "Paris", "so it is paris", "n", "it is n",
    "",     "between 3 and 4", "$12", "12%", "3.0", "3",
)  # fmt: skip
OPTIONS = {"A": "cat", "B": "dog", "C": "owl", "D": "fox"}


@dataclass(frozen=True)
class Case:
    answer: str
    truth: str
    ours: float
    theirs: float


def humans(draw: random.Random) -> list[str]:
    first, second = draw.choice(SHORT), draw.choice(SHORT)
    split = draw.randrange(11)
    return [first] * split + [second] * (10 - split)


def soft(
    ours: Callable[[str, list[str]], float],
    theirs: Callable[[dict, list[str]], dict],
    *,
    as_dicts: bool = False,
) -> Iterator[Case]:
    draw = random.Random(0)
    for answer in SHORT * 20:
        given = humans(draw)
        answers: list = (
            [{"answer": t, "answer_id": k} for k, t in enumerate(given)] if as_dicts else list(given)
        )
        doc = {"answers": answers, "question_id": 1}
        theirs_score = theirs(copy.deepcopy(doc), [answer])["exact_match"]
        yield Case(
            answer,
            f"{given.count(given[0])} x {given[0]!r}, rest {given[-1]!r}",
            ours(answer, given),
            theirs_score,
        )


def pope() -> Iterator[Case]:
    for answer in YES_NO:
        for truth in ("yes", "no"):
            result = lmms_pope.pope_process_results({"answer": truth, "question_id": 1}, [answer])
            says = "yes" if pope_says_yes(answer) else "no"
            yield Case(answer, truth, float(says == truth), result["pope_accuracy"]["score"])


def mme() -> Iterator[Case]:
    for answer in YES_NO:
        for truth in ("yes", "no"):
            ours = float(mme_reading(answer) == truth)
            yield Case(answer, truth, ours, float(lmms_mme.parse_pred_ans(answer) == truth))


def scienceqa() -> Iterator[Case]:
    for answer in LETTERS:
        for truth in range(4):
            doc = {"choices": list(OPTIONS.values()), "answer": truth}
            theirs = lmms_sqa.sqa_process_results(doc, [answer])["exact_match"]
            yield Case(answer, "ABCD"[truth], float(scienceqa_option(answer, 4) == truth), theirs)


def mmbench() -> Iterator[Case]:
    judge = MMBench_Evaluator()
    for answer in LETTERS:
        for truth in "ABCD":
            item = {"prediction": answer, "question": "?", **OPTIONS}
            theirs = judge.prefetch_answer(item) or ""
            yield Case(answer, truth, float(mmbench_option(answer, OPTIONS) == truth), float(theirs == truth))


def mmmu_multiple_choice() -> Iterator[Case]:
    for answer in LETTERS:
        ours = mmmu_choice(answer, "ABCD", OPTIONS)
        theirs = lmms_mmmu.parse_multi_choice_response(answer, list("ABCD"), dict(OPTIONS))
        for truth in "ABCD":
            # Where we find nothing the official code draws a letter; whatever theirs is then is a difference.
            yield Case(answer, truth, float(ours.letter == truth), float(theirs == truth))


def mmmu_open() -> Iterator[Case]:
    for answer in OPEN:
        for truth in OPEN:
            if truth:
                theirs = lmms_mmmu.eval_open(truth, lmms_mmmu.parse_open_response(answer))
                yield Case(answer, truth, float(is_open_correct(answer, truth)), float(theirs))


def main() -> None:
    compared = {
        "vqav2_val": soft(vqa_accuracy, lmms_vqav2.vqav2_process_results, as_dicts=True),
        "textvqa": soft(textvqa_accuracy, lmms_textvqa.textvqa_process_results),
        "vizwiz_val": soft(vizwiz_accuracy, lmms_vizwiz.vizwiz_vqa_process_results),
        "pope": pope(),
        "mme": mme(),
        "scienceqa": scienceqa(),
        "mmbench": mmbench(),
        "mmmu, choice": mmmu_multiple_choice(),
        "mmmu, open": mmmu_open(),
    }
    print("| benchmark | judged | alike | we give more | they give more | answers read differently |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    for name, cases in compared.items():
        found = list(cases)
        more = [case for case in found if case.ours > case.theirs + 1e-9]
        less = [case for case in found if case.theirs > case.ours + 1e-9]
        shown = ", ".join(f"`{answer!r}`" for answer in dict.fromkeys(case.answer for case in more + less))
        alike = len(found) - len(more) - len(less)
        print(f"| {name} | {len(found)} | {alike} | {len(more)} | {len(less)} | {shown} |")


if __name__ == "__main__":
    main()
