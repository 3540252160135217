"""Commands of `llava-kd data` that choose records, and let models write some."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

from llava_kd.assembly.early import look_at_checkpoint, look_at_stage
from llava_kd.cli.words import Commands, command, count, is_first_rank, show

if TYPE_CHECKING:
    from llava_kd.assembly.curating.answer import Answering


def add(data: Commands) -> None:
    what = (
        "select records by how much better the teacher predicts them than a small reference model (MiniPLM), "
    )
    what += "or by how much student and teacher disagree"
    select = command(data, "select", _select, what, takes_settings=True)
    select.add_argument("config", help="YAML file of the stage; any setting may follow as --a.b=value")
    by = (
        "difference: how much better the teacher predicts a record than --reference; disagreement: how "
        "far the student is from the teacher"
    )
    select.add_argument("--by", choices=["difference", "disagreement"], default="difference", help=by)
    small = "for --by difference: stock LLaVA directory of the small reference model"
    select.add_argument("--reference", help=small)
    own = (
        "for --by disagreement: stock LLaVA directory of the student (default: the stage's "
        "student.checkpoint)"
    )
    select.add_argument("--with_student", help=own)
    # Not --teacher: as --teacher=null it is a setting of the stage.
    named = "stock LLaVA directory of the teacher (default: the stage's teacher.checkpoint)"
    select.add_argument("--with_teacher", help=named)
    select.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="dtype of both models")
    select.add_argument("--keep", type=share, required=True, help="share of the records to keep, such as 0.5")
    select.add_argument("--out", required=True, help="output directory; existing scores are reused")
    select.add_argument(
        "--group",
        default="file",
        help="apply the share within each `file`, image `folder`, or value of the record field FIELD",
    )
    quota = "a different share for one group; may be repeated"
    select.add_argument(
        "--quota", action="append", default=[], type=_quota, metavar="GROUP=SHARE", help=quota
    )
    select.add_argument("--pool", action="store_true", help="rank all groups together")
    select.add_argument(
        "--any_reference",
        action="store_true",
        help="continue even if the reference predicts as well as the teacher",
    )
    select.add_argument(
        "--examples", type=count, default=20, help="number of records to show from each end of the ranking"
    )
    what = "compute the mean prediction of a model for each frequent answer token, for objective.mcmi (MCMI)"
    centroids = command(data, "centroids", _centroids, what, takes_settings=True)
    centroids.add_argument("config", help="YAML file of the stage; any setting may follow as --a.b=value")
    centroids.add_argument("--out", required=True, help="safetensors file; must not exist")
    centroids.add_argument("--tokens", type=count, default=256, help="largest number of tokens")
    centroids.add_argument("--least", type=count, default=10, help="least number of occurrences of a token")
    _add_answer(data)
    _add_rationale(data)


def _add_answer(data: Commands) -> None:
    what = "generate, filter or compare answers and questions with models; writes LLaVA JSON with its origin"
    answer = data.add_parser("answer", help=what, description=what).add_subparsers(dest="how", required=True)
    label = command(
        answer, "label", _label, "answer the questions that have no answer (with --relabel: all questions)"
    )
    label.add_argument("--relabel", action="store_true", help="replace every existing answer too")
    expand = command(answer, "expand", _expand, "write new questions about the images, without answers")
    expand.add_argument(
        "--prompts", required=True, help="text file with one prompt per line; each is given with every image"
    )
    curate = command(
        answer, "curate", _curate, "keep answers that a model finds likely, or that it also gives itself"
    )
    curate.add_argument("--by", choices=["likelihood", "agreement"], required=True)
    curate.add_argument("--keep", type=share, help="for --by likelihood: share of the records to keep")
    curate.add_argument(
        "--least", type=float, help="for --by likelihood: least mean log p per token, such as -0.5"
    )
    feedback = command(
        answer, "feedback", _feedback, "write preference pairs of a student's answers, scored by --model"
    )
    feedback.add_argument("--student", required=True, help="stock LLaVA directory of the model that answers")
    feedback.add_argument("--samples", type=count, default=4, help="number of answers per question")
    feedback.add_argument(
        "--margin",
        type=float,
        default=0.1,
        help="least difference of mean log p between the two answers of a pair",
    )
    for how in (label, expand, curate, feedback):
        _add_writing(how, temperature=1.0 if how is feedback else 0.0)


def _add_rationale(data: Commands) -> None:
    what = "generate step-by-step answers, check each step against evidence, and correct wrong steps"
    rationale = command(data, "rationale", _rationale, what)
    _add_writing(rationale, temperature=0.0)
    rationale.add_argument("--scene_graphs", help="JSON file: scene graph of each record's picture")
    rationale.add_argument("--boxes", help="JSON file: labelled boxes of each record")
    rationale.add_argument("--ocr", help="JSON file: the words in each record's picture")
    rationale.add_argument("--facts", help="CSV or JSON table of subject, relation, object (and record)")
    rationale.add_argument("--texts", help="folder of .txt and .md files, searched by BM25")
    rounds = "how many times to regenerate an answer from a wrong step on; 0 drops the record"
    rationale.add_argument("--rounds", type=partial(count, least=0), default=3, help=rounds)
    unread = "a step that no evidence can check: keep and count it, or drop the record"
    rationale.add_argument("--unread", choices=["keep", "drop"], default="keep", help=unread)
    true = "drop answers that differ from the answer in the data"
    rationale.add_argument("--true_answers", action="store_true", help=true)
    rationale.add_argument("--answer", default="Answer:", help="start of the last line of an answer")
    rationale.add_argument(
        "--prompt", help="text appended to each question to ask for steps; '' appends nothing"
    )


def _add_writing(how: argparse.ArgumentParser, *, temperature: float) -> None:
    how.add_argument("--model", required=True, help="stock LLaVA directory")
    how.add_argument("--data", required=True, help="LLaVA .json or .jsonl file")
    how.add_argument("--images", help="image root (default: the folder of --data)")
    how.add_argument(
        "--follow_symlinks", action="store_true", help="allow links that lead out of the image root"
    )
    how.add_argument("--out", required=True, help="output directory; existing answers are kept")
    how.add_argument("--batch_size", type=count, default=32)
    how.add_argument(
        "--max_new_tokens", type=count, default=256, help="longest answer in tokens; a longer one is dropped"
    )
    greedy = f"0 is greedy (default: {temperature:g})"
    how.add_argument("--temperature", type=float, default=temperature, help=greedy)
    how.add_argument("--top_p", type=float, default=1.0)
    how.add_argument("--seed", type=partial(count, least=0), default=0, help="seed of sampling")
    how.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    how.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a share above 0 and at most 1, such as 0.5; got {text}")
    return value


def _quota(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"must be GROUP=SHARE, such as coco=0.3; got {text}")
    return name, share(value)


# Commands import what they need: `llava-kd --help` should not wait for PyTorch, nor a signal for its handler.


def _select(arguments: argparse.Namespace) -> int:
    is_difference = arguments.by == "difference"
    if (arguments.with_student if is_difference else arguments.reference) is not None:
        named = ("--with_student", "disagreement") if is_difference else ("--reference", "difference")
        raise ValueError(f"{named[0]} needs --by {named[1]}; leave it out, or give --by {named[1]}")
    smaller = arguments.reference if is_difference else arguments.with_student
    if smaller is not None:
        look_at_checkpoint(smaller)
    look_at_stage(arguments.config, arguments.overrides)
    from llava_kd.assembly.curating.select import Selection, select
    from llava_kd.assembly.settings import load
    from llava_kd.curation.difference import Share

    quotas = dict(arguments.quota)
    if len(quotas) < len(arguments.quota):
        raise ValueError("--quota must name each group once; give each group one share")
    selection = Selection(
        by=arguments.by,
        smaller=smaller,
        share=Share(keep=arguments.keep, quotas=quotas, pooled=arguments.pool),
        teacher=arguments.with_teacher,
        dtype=arguments.dtype,
        group=arguments.group,
        any_reference=arguments.any_reference,
        num_shown=arguments.examples,
    )
    return _say(select(load(arguments.config, arguments.overrides), arguments.out, selection))


def _centroids(arguments: argparse.Namespace) -> int:
    look_at_stage(arguments.config, arguments.overrides)
    from llava_kd.assembly.curating.centroids import centroids
    from llava_kd.assembly.settings import load

    config = load(arguments.config, arguments.overrides)
    return _say(centroids(config, arguments.out, most=arguments.tokens, least=arguments.least))


def _answering(arguments: argparse.Namespace) -> Answering:
    from llava_kd.assembly.curating.answer import Answering
    from llava_kd.evaluation.generation.writing import Writing

    return Answering(
        data=arguments.data,
        out=arguments.out,
        model=arguments.model,
        images=arguments.images,
        follow_symlinks=arguments.follow_symlinks,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        writing=Writing(
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed,
            marks_cut=True,
        ),
        dtype=arguments.dtype,
        device=arguments.device,
    )


def _say(told: str) -> int:
    if is_first_rank():
        show(told)
    return 0


def _label(arguments: argparse.Namespace) -> int:
    from llava_kd.assembly.curating.answer import label_data

    return _say(label_data(_answering(arguments), relabel=arguments.relabel))


def _expand(arguments: argparse.Namespace) -> int:
    from llava_kd.assembly.curating.answer import expand_data

    return _say(expand_data(_answering(arguments), arguments.prompts))


def _curate(arguments: argparse.Namespace) -> int:
    from llava_kd.assembly.curating.answer import agree_data, likely_data

    if arguments.by == "agreement":
        if arguments.keep is not None or arguments.least is not None:
            raise ValueError("--keep and --least need --by likelihood; leave them out, or change --by")
        return _say(agree_data(_answering(arguments)))
    return _say(likely_data(_answering(arguments), keep=arguments.keep, least=arguments.least))


def _rationale(arguments: argparse.Namespace) -> int:
    from llava_kd.assembly.curating.rationale import READERS, Sources, rationale_data
    from llava_kd.curation.rationale.verifying import PROMPT, Rules

    sources = {kind: getattr(arguments, kind) for kind in READERS}
    if not any(sources.values()):
        raise ValueError(
            "`rationale` needs evidence for the steps; give at least one of "
            f"{', '.join(f'--{kind}' for kind in READERS)}"
        )
    rules = Rules(
        rounds=arguments.rounds,
        unread=arguments.unread,
        true_answers=arguments.true_answers,
        answer=arguments.answer,
        prompt=PROMPT if arguments.prompt is None else arguments.prompt,
    )
    return _say(rationale_data(_answering(arguments), Sources(**sources), rules))


def _feedback(arguments: argparse.Namespace) -> int:
    from llava_kd.assembly.curating.answer import feedback_data

    made = feedback_data(
        _answering(arguments), arguments.student, samples=arguments.samples, margin=arguments.margin
    )
    return _say(made)
