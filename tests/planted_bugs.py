"""The twenty hazards of docs/reliability.md, planted one at a time in a copy: each must fail its test.

python tests/planted_bugs.py            all of them, and the same tests without a bug
python tests/planted_bugs.py 7 17       some hazards only
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
SECONDS_A_TEST = 900.0  # pytest itself ends most after 600
_MARK = "PLANTED_BUG_RUN"  # in the environment of all that a run starts


@dataclass(frozen=True)
class Bug:
    """`old` stands in llava_kd/`file`; with `new` in its place, wherever it stands, `test` must fail.

    `hazard` is its row in docs/reliability.md, 0 where it has none.
    """

    hazard: int
    file: str
    old: str
    new: str
    test: str


BUGS = (
    Bug(
        1,
        "distill/head_terms.py",
        "return 1.0 / count(self.counts, LABELLED if",
        "return 1.0 / count(self.batch.counts(), LABELLED if",
        "test_distill_objective.py::test_a_step_does_not_depend_on_the_split",
    ),
    Bug(
        1,
        "parallel/torch_engine.py",
        "(loss * self.world.size).backward()",
        "loss.backward()",
        "distributed/test_trajectories.py::test_losses_and_weights_do_not_depend_on_cut_or_engine"
        "[padded-distilled-ddp]",
    ),
    Bug(
        2,
        "models/vocabulary.py",
        "return columns",
        "return min(student_rows, teacher_rows)",
        "test_models_vocabulary.py::test_the_common_columns_are_the_tokenizers_and_not_the_padding_rows",
    ),
    Bug(
        3,
        "models/vocabulary.py",
        "if rows < (needed := max(names) + 1):",
        "if rows < (needed := 0):",
        "test_models_vocabulary.py::test_a_head_narrower_than_its_tokenizer_is_refused",
    ),
    Bug(
        4,
        "losses/head_loss.py",
        "return HeadLoss(*_HeadLoss.apply(*inputs, student, teacher, rows, gradients))",
        "logits_NV = student_ND @ student_head_VD.T\n"
        "    ce_N = torch.nn.functional.cross_entropy(logits_NV, targets_N.clamp_min(0), reduction='none')\n"
        "    loss = (ce_weight_N * ce_N).sum()\n"
        "    return HeadLoss(loss, ce_N.detach(), torch.zeros_like(ce_N))",
        "test_losses_head_loss.py::test_weight_is_not_needed_after_the_forward",
    ),
    Bug(
        5,
        "distill/teaching/live.py",
        "class Teacher:",
        "class Teacher(torch.nn.Module):\n    def __new__(cls, *_: object, **__: object) -> Teacher:\n"
        "        self = super().__new__(cls)\n        torch.nn.Module.__init__(self)\n        return self\n",
        "test_distill_teacher.py::test_the_teacher_is_not_in_the_students_tree",
    ),
    Bug(
        6,
        "distill/teaching/live.py",
        "self._mllm.stock.eval()",
        "self._mllm.stock.train()",
        "test_distill_teacher.py::test_the_teacher_says_the_same_twice_even_after_the_student_trains",
    ),
    Bug(
        7,
        "batch.py",
        "labels_BT[:, 1:], (0, 1)",
        "labels_BT[:, :-1], (1, 0)",
        "test_batch.py::test_a_target_is_the_next_label_and_the_last_place_has_none",
    ),
    Bug(
        7,
        "data/text/encoder.py",
        "labels = torch.where(is_target, ids",
        "labels = torch.where(is_target.roll(1), ids",
        "test_data_template.py::test_labels_are_the_answers_and_their_end_tokens",
    ),
    Bug(
        8,
        "distill/teaching/live.py",
        "inputs = batch.teacher_inputs",
        "inputs = batch.student",
        "test_distill_teacher.py::test_the_teacher_reads_its_own_side",
    ),
    Bug(
        9,
        "data/text/alignment.py",
        "if torch.equal(ids[0], ids[1]):",
        "if True:",
        "test_data_loader.py::test_sides_that_answer_in_different_tokens_are_named",
    ),
    Bug(
        9,
        "data/text/alignment.py",
        "return _only(student, keeps[0]), _only(teacher, keeps[1])",
        "return encoded",
        "test_data_loader.py::test_truncation_on_one_side_takes_the_targets_of_both",
    ),
    Bug(
        10,
        "losses/divergence.py",
        "return (logp_NC.exp() * (logp_NC - logq_NC)).sum(1)",
        "return (logp_NC.exp() * (logp_NC - logq_NC))[:, : logp_NC.shape[1] // 2].sum(1)",
        "test_losses_reference.py::test_head_loss_equals_loops_over_the_definition",
    ),
    Bug(
        11,
        "distill/rows.py",
        "return counts[name].clamp_min(1)",
        "return counts[name]",
        "test_distill_objective.py::test_a_batch_without_rows_is_finite_and_reaches_every_weight",
    ),
    Bug(
        11,
        "losses/head_loss.py",
        "inputs = (student_ND, student_head_VD, student_bias_V)\n",
        "inputs = (student_ND, student_head_VD, student_bias_V)\n    if not ce_weight_N.any():\n"
        "        zeros_N = torch.zeros_like(ce_weight_N)\n"
        "        return HeadLoss(zeros_N.sum(), zeros_N, zeros_N)\n",
        "test_losses_bad_input.py::test_nothing_to_do_gives_a_zero_that_is_joined_to_the_graph",
    ),
    Bug(
        12,
        "data/text/encoder.py",
        "if is_truncated and bool(visual[end:].any()):",
        "if False:",
        "test_data_template.py::test_truncation_never_drops_a_later_image",
    ),
    Bug(
        12,
        "data/text/encoder.py",
        "if not bool(is_target.any()):",
        "if False:",
        "test_data_template.py::test_truncation_keeps_images_and_targets_or_names_the_record",
    ),
    Bug(
        13,
        "models/mllm.py",
        "embedded_BTD = embedded_BTD + 0.0 * projected_IND.sum()",
        "pass",
        "test_models_mllm.py::test_a_text_only_batch_gives_the_projector_a_zero_gradient",
    ),
    Bug(
        14,
        "models/mllm.py",
        "with torch.set_grad_enabled(has_gradient and torch.is_grad_enabled()):",
        "with torch.no_grad():",
        "test_models_mllm.py::test_gradients_reach_the_trained_parts_and_no_other",
    ),
    Bug(
        15,
        "parallel/torch_engine.py",
        '"exp_avg": values[1],',
        '"exp_avg": torch.zeros_like(values[1]),',
        "test_end_to_end.py::test_a_run_resumed_twice_ends_bit_for_bit_where_an_undisturbed_one_does",
    ),
    Bug(
        16,
        "distill/objective.py",
        "share, means[name] = _weighted(term, seen, counts)",
        "share, _ = _weighted(term, seen, counts)",
        "test_training_trainer.py::test_the_log_names_every_term_and_what_it_cost",
    ),
    Bug(
        16,
        "distill/advice.py",
        "if share >= LEAST_SHARE:",
        "if share >= 0:",
        "test_training_diagnostics.py::test_a_hundred_steps_in_a_row_are_needed",
    ),
    Bug(
        17,
        "losses/reference.py",
        "kl_N = _spread(squared(temperature) * kl, rows, kl_weight_N)",
        "kl_N = _spread(kl, rows, kl_weight_N)",
        "test_losses_reference.py::test_head_loss_equals_loops_over_the_definition",
    ),
    Bug(
        17,
        "distill/head_terms.py",
        '"temperature": kind[0],',
        '"temperature": 1.0,',
        "test_distill_objective.py::test_every_term_is_what_its_definition_says",
    ),
    Bug(
        18,
        "distill/head_terms.py",
        "return fill(rows, 0.0)",
        "return fill(rows, 1.0)",
        "test_distill_objective.py::test_a_term_that_is_off_is_out_of_the_loss_and_of_the_log",
    ),
    Bug(
        18,
        "distill/teaching/from_teacher.py",
        'return result.ce_N.sum() / counts["response_tokens"].clamp_min(1).float()',
        'return result.ce_N.sum() / counts["visual_tokens"].clamp_min(1).float()',
        "test_training_teacher_loss.py::test_it_is_what_transformers_says_of_the_teacher",
    ),
    Bug(
        19,
        "models/mllm.py",
        "layer=feature_layer(config),",
        "layer=feature_layer(config) - 1,",
        "test_models_mllm.py::test_logits_are_those_of_the_stock_model",
    ),
    Bug(
        20,
        "models/mllm.py",
        "if placeholders != rows:",
        "if False:",
        "test_models_mllm.py::test_placeholders_and_features_must_have_the_same_number",
    ),
    Bug(
        20,
        "data/text/encoder.py",
        "repeats = torch.where(is_image, self.tokens_per_image, 1)",
        "repeats = torch.where(is_image, 9, 1)",
        "test_data_template.py::test_each_image_fills_its_places",
    ),
)


def planted(bug: Bug) -> str:
    """The file with the bug. ValueError if its place is not there."""
    text = (ROOT / "llava_kd" / bug.file).read_text()
    if bug.old not in text:
        raise ValueError(f"{bug.old!r} is not in {bug.file}; say where the bug goes now")
    return text.replace(bug.old, bug.new)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """`status`: 0 all passed, 1 some test function failed, 2 neither. `orphans`: processes left and ended."""

    status: int
    orphans: int = 0


def ends(tests: Sequence[str], bug: Bug | None, log: Path) -> Ended:
    """How `tests` end in a copy of the project with `bug`, run by a Python that writes into `log`."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        for name in ("llava_kd", "tests", "pyproject.toml"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        if bug is not None:
            (copy / "llava_kd" / bug.file).write_text(planted(bug))
        # Every Python reads it after the .pth files, which may put another copy before PYTHONPATH.
        (copy / "sitecustomize.py").write_text(f"import sys\nsys.path.insert(0, {str(copy)!r})\n")
        mark = f"{_MARK}={uuid.uuid4().hex}"
        paths = os.pathsep.join([str(copy), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        environment = os.environ | dict([mark.split("=")], PYTHONPATH=paths)
        _check_import(copy, environment)
        return _run(tests, copy, environment, log, mark)


def _check_import(copy: Path, environment: Mapping[str, str]) -> None:
    command = [sys.executable, "-c", "import llava_kd; print(llava_kd.__file__)"]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=True)
    if copy.resolve() not in Path(done.stdout.strip()).resolve().parents:
        raise ValueError(f"the tests must read the copy {copy}, but Python reads {done.stdout.strip()}")


def _run(tests: Sequence[str], copy: Path, environment: Mapping[str, str], log: Path, mark: str) -> Ended:
    results = copy / "results.xml"
    command = [sys.executable, "-m", "pytest", "-m", "", "-p", "no:cacheprovider", "--tb=short"]
    command += [f"--junitxml={results}", *(f"tests/{test}" for test in tests)]
    with log.open("ab") as said:
        process = subprocess.Popen(
            command, cwd=copy, env=environment, stdin=subprocess.DEVNULL, stdout=said,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_A_TEST * len(tests))
            is_late = process.poll() is None
        finally:
            orphans = _end_all(mark, grace=0 if process.poll() is None else 5)
            process.kill()  # where there is no /proc; else it has ended
            process.wait()
    if is_late or not results.exists():
        return Ended(status=2, orphans=orphans)
    suites = ElementTree.parse(results).getroot()
    if suites.find(".//testcase/failure") is not None:  # an error of a fixture is <error>
        return Ended(status=1, orphans=orphans)
    return Ended(status=0 if process.returncode == 0 else 2, orphans=orphans)


def _end_all(mark: str, *, grace: float) -> int:
    """Kill every process whose environment has `mark`, and say how many there were after `grace` seconds."""
    deadline = time.monotonic() + grace
    while (left := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    found = set(left)
    while left:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
        found.update(left := _marked(mark))
    return len(found)


def _marked(mark: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it ended, or is another user's
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def main(words: Sequence[str]) -> int:
    """0 if every bug is caught and nothing fails without one."""
    chosen = [bug for bug in BUGS if not words or str(bug.hazard) in words]
    return try_all({f"{bug.hazard:>3} {number}": bug for number, bug in enumerate(chosen)})


def try_all(bugs: Mapping[str, Bug]) -> int:
    """The same, of bugs by name."""
    logs = Path(tempfile.mkdtemp(prefix="planted-bugs-"))
    print(f"logs: {logs}")
    tests = sorted({bug.test for bug in bugs.values()})
    problems = int(ends(tests, None, logs / "no-bug.log").status != 0)
    print("without a bug:", "some test fails" if problems else "every test passes", flush=True)
    for name, bug in bugs.items():
        ended = ends([bug.test], bug, logs / f"{name.replace(' ', '-')}.log")
        problems += ended.status != 1
        verdict = "caught" if ended.status == 1 else "MISSED"
        left = f" (processes left and ended: {ended.orphans})" if ended.orphans else ""
        print(f"{name}  {verdict}{left}  {bug.file}: {bug.test}", flush=True)
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
