"""Every change of docs/extending.md, made from the blocks of the page, and the slips that it catches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from extending_page import PLUGINS, Copy, section, write_plugins
from PIL import Image
from safetensors.torch import load_file
from test_evaluation_report import write_log, write_model
from tiny_towers import make_language_model, make_tower
from transformers import SiglipImageProcessor

from llava_kd.assembly.plugins import OURS, with_plugins
from llava_kd.assembly.settings import labels
from llava_kd.cli import main
from llava_kd.models.files.checkpoint import load_stock
from llava_kd.models.towers.vision_tower import text_config

Stage = Callable[..., Path]
CLI = "from llava_kd.cli import main; assert main(sys.argv[1:]) == 0"
CE = {"cross_entropy": {"weight": 1.0}}


@pytest.fixture
def pages(tmp_path: Path) -> dict[str, str]:
    return write_plugins(tmp_path)


def train(config: Path, name: str, *words: str) -> Path:
    output = config.parent / name
    assert main(["train", str(config), f"--output_dir={output}", *words]) == 0
    return output


def logged(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()[-1:]) == 1
    return said


def with_mapped(stage: Stage, pages: dict[str, str], **more: object) -> Path:
    objective = CE | {"mapped_states": {"weight": 0.5, "margin": 0.1}}
    return stage("hinted", plugins=[pages["my_terms.py"]], objective=objective, **more)


# 1. A loss term


def test_a_term_of_a_plug_in_trains_is_logged_and_goes_on_as_if_never_stopped(
    stage: Stage, pages: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_mapped(stage, pages, max_steps=4, checkpoint={"every": 2, "keep": 5}, optim={"lr": 0.01})
    whole = train(config, "whole")
    figures = logged(whole)
    assert all(line["mapped_states"] > 0 for line in figures)
    for line in figures:  # the loss is the weighted sum
        assert line["loss"] == pytest.approx(line["cross_entropy"] + 0.5 * line["mapped_states"], rel=1e-6)
    assert figures[-1]["mapped_states"] < figures[0]["mapped_states"]  # its own weights learn
    assert "plug-in" in " ".join(json.loads((whole / "run.json").read_text())["fingerprints"])
    # What terms bring stays out of the student.
    assert not any("mapped_states" in name for name in weights(whole))

    half = Path(shutil.copytree(whole, config.parent / "half"))
    for gone in ("run.json", "metrics.jsonl"):
        (half / gone).unlink()
    shutil.rmtree(half / "model")
    shutil.rmtree(half / "checkpoints" / "step-00000004")
    train(config, "half")
    assert equal(weights(half), weights(whole))

    shutil.rmtree(half / "model")
    (half / "run.json").unlink()
    shutil.rmtree(half / "checkpoints" / "step-00000004")
    changed = Path(pages["my_terms.py"])
    changed.write_text(changed.read_text().replace("rows_N - self.margin", "rows_N + self.margin"))
    said = refused(capsys, "train", config, f"--output_dir={half}")
    assert f"plug-in {changed} changed since the run in {half} started" in said


def test_its_label_stands_in_the_report(pages: dict[str, str], tmp_path: Path) -> None:
    for arm, terms in (("plain", ("cross_entropy",)), ("kd", ("cross_entropy", "mapped_states"))):
        write_model(tmp_path / "run" / "seed0" / arm / "eval", "10")
        write_log(tmp_path / "run" / "seed0" / arm / "stage1", terms)
    words = ["report", "--run", str(tmp_path / "run")]
    assert main([*words, "--plugin", pages["my_terms.py"]]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    label = labels([pages["my_terms.py"]])["mapped_states"]
    assert label.split(";")[0].replace("'", "&#x27;") in page
    assert main(words) == 0
    assert "mapped to the teacher" not in (tmp_path / "run" / "report.html").read_text()


def test_a_cache_of_states_serves_it_and_one_of_logits_is_refused_by_its_name(
    stage: Stage, pages: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_mapped(stage, pages, max_steps=2)
    assert main(["cache-teacher", str(config), f"--out={tmp_path / 'states'}"]) == 0
    live, cached = train(config, "live"), train(config, "cached", f"--teacher.cache={tmp_path / 'states'}")
    for a, b in zip(logged(live), logged(cached), strict=True):
        assert b["mapped_states"] == pytest.approx(a["mapped_states"], rel=1e-5)
    said = refused(
        capsys, "cache-teacher", config, f"--out={tmp_path / 'logits'}", "--mode", "topk", "--topk", 4
    )
    assert "mapped_states" in said


def test_a_term_without_a_teacher_is_refused_by_its_name(
    stage: Stage, pages: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "train", with_mapped(stage, pages), "--teacher=null")
    assert "mapped_states" in said
    assert "teacher" in said


@pytest.mark.parametrize(
    ("slip", "message"),
    [
        (('teacher="states", places=("response",)', 'teacher="states"'), "places=('response', ...)"),
        (('teacher="states", ', ""), "`objective`|teacher"),
        (("TERMS = {", "TERM = {"), "defines TERM; rename it to TERMS"),
        (('    label: ClassVar[str] = "', '    name: ClassVar[str] = "'), "must have a `label`"),
        (("def total(", "def totals("), "must provide a `total`"),
        (("@dataclass(frozen=True, kw_only=True)\n", ""), "must be a dataclass of its settings"),
        (("mapped_states", "relation"), "must not reuse the existing name 'relation'"),
    ],
    ids=["row not declared", "teacher not declared", "table", "label", "value", "dataclass", "name"],
)
def test_a_slip_in_a_term_is_named(
    stage: Stage,
    pages: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    slip: tuple[str, str],
    message: str,
) -> None:
    path = Path(pages["my_terms.py"])
    code = path.read_text()
    assert slip[0] in code
    path.write_text(code.replace(*slip))
    said = refused(capsys, "train", with_mapped(stage, pages, max_steps=1))
    assert any(part in said for part in message.split("|"))


def test_in_the_package_it_is_one_file_and_a_line_of_the_table(
    stage: Stage, pages: dict[str, str], tmp_path: Path
) -> None:
    copy = Copy(tmp_path / "copy", 1)
    code = PLUGINS["my_terms.py"].split("\n", 1)[1].split("\n\nTERMS =")[0] + "\n"
    copy.add("llava_kd/distill/terms/mapped_states.py", '"""States, mapped."""\n' + code)
    assert len(copy.touched) == 2
    config = with_mapped(stage, pages, max_steps=2)
    by_plugin = train(config, "plugged")
    tree = yaml.safe_load(config.read_text()) | {"plugins": [], "output_dir": str(tmp_path / "own")}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(tree))
    done = copy.run(CLI, "train", str(tmp_path / "own.yaml"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert equal(weights(tmp_path / "own"), weights(by_plugin))


def test_its_settings_are_shown_with_their_help(
    pages: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["config", "objective.mapped_states", "--plugin", pages["my_terms.py"]]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "margin" in shown
    assert "distances below it count as 0" in shown
    assert main(words[:2]) == 2


# 2. A vision tower


@pytest.fixture
def patches(pages: dict[str, str], tmp_path: Path) -> Path:
    """A tower of the page on disk."""
    kind = with_plugins([pages["my_tower.py"]]).towers["patches"].model_class
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        kind(kind.config_class()).save_pretrained(tmp_path / "tower")
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "tower")
    return tmp_path / "tower"


def composed(stage: Stage, tower: object, llm: Path, **more: object) -> Path:
    config = stage("composed", distilled=False, template="chatml", max_steps=2, **more)
    return changed(config, student={"vision_tower": str(tower), "language_model": str(llm)})


def changed(config: Path, **sections: dict[str, object]) -> Path:
    """The same stage with other sections."""
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | sections))
    return config


def test_a_tower_of_a_plug_in_trains_and_its_student_answers(
    stage: Stage, pages: dict[str, str], patches: Path, shapes_dir: Path, tmp_path: Path
) -> None:
    llm = make_language_model("qwen2", tmp_path / "llm")
    plugin = pages["my_tower.py"]
    config = composed(
        stage, patches, llm, plugins=[plugin], trainable=["vision_tower", "multi_modal_projector"]
    )
    output = train(config, "run")
    parts = load_stock(str(output / "model"))
    assert parts.tokens_per_image == 1 + 16
    assert parts.visual_grid.prefix == 1
    before, after = load_file(patches / "model.safetensors"), weights(output)
    moved = {n for n, t in before.items() if not torch.equal(t, after[f"vision_tower.{n}"])}
    assert moved == before.keys() - {"layers.1.weight", "layers.1.bias"}  # layer -2 does not read the last
    data = shapes_dir / "test.json"
    words = [
        "eval",
        "--model",
        output / "model",
        "--data",
        data,
        "--images",
        shapes_dir,
        "--out",
        tmp_path / "s",
    ]
    assert main([str(word) for word in [*words, "--max_new_tokens", 2, "--plugin", plugin]]) == 0
    assert json.loads((tmp_path / "s" / "summary.json").read_text())["count"] > 0


def test_a_wrong_number_of_leading_tokens_is_refused_before_a_step(
    stage: Stage, pages: dict[str, str], patches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slip = tmp_path / "slip.py"
    slip.write_text(Path(pages["my_tower.py"]).read_text().replace("num_cls=1", "num_cls=0"))
    llm = make_language_model("qwen2", tmp_path / "llm")
    said = refused(capsys, "train", composed(stage, patches, llm, plugins=[str(slip)]))
    assert "tokens" in said
    assert not (tmp_path / "composed" / "checkpoints").exists()


# 3. A language-model family, and 8. a recipe: a YAML file


@pytest.mark.parametrize("family", ["qwen3", "olmo2"])
def test_another_language_model_is_a_line_of_yaml(stage: Stage, tmp_path: Path, family: str) -> None:
    llm = make_language_model(family, tmp_path / "llm")
    output = train(composed(stage, make_tower("siglip", tmp_path / "tower"), llm), "run")
    assert len(logged(output)) == 2
    config = load_stock(str(output / "model")).stock.config
    assert text_config(config).model_type == json.loads((llm / "config.json").read_text())["model_type"]


def test_a_recipe_is_checked_to_its_last_key(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    config = stage("recipe")
    config.write_text(config.read_text().replace("relation:", "relatoin:"))
    assert "did you mean `relation`" in refused(capsys, "train", config)


# 4. A data source


@pytest.fixture
def tsv(tmp_path: Path, shapes_dir: Path) -> Path:
    """Captions of shapes as lines, one of them of an image that is not there."""
    entries = json.loads((shapes_dir / "captions.json").read_text())[:12]
    lines = [f"{entry['image']}\t{entry['conversations'][-1]['value']}" for entry in entries]
    (tmp_path / "captions.tsv").write_text("\n".join([*lines[:-1], f"gone.png\t{lines[-1]}"]) + "\n")
    return tmp_path / "captions.tsv"


def test_a_source_of_a_plug_in_is_read_by_training_by_workers_and_by_verify(
    stage: Stage, pages: dict[str, str], tsv: Path, shapes_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin = pages["my_source.py"]
    data = {"path": str(tsv), "images": str(shapes_dir), "template": "plain", "max_length": 512}
    data |= {"max_bad_rate": 0.5, "num_workers": 0}
    config = changed(stage("run", plugins=[plugin], distilled=False), data=data)
    alone, workers = train(config, "alone"), train(config, "workers", "--data.num_workers=2")
    assert equal(weights(alone), weights(workers))
    assert "gone.png" in (alone / "bad_records.jsonl").read_text()
    words = ["data", "verify", "--plugin", plugin, "--data", str(tsv), "--images", str(shapes_dir)]
    capsys.readouterr()
    assert main(words) == 1
    assert "11 of 12 records are sound" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("slip", "message"),
    [
        (("self.faults =", "self.flaws ="), "has no faults"),
        (("self._place = place", "self._place = place; self.key = lambda: 0"), "cannot open .*pickle|local"),
        (("        return self._records[i]\n", "        return 1\n"), "must be a Record; got int"),
        (("content.decode()", "content.decode(what)"), "NameError: name 'what' is not defined (line"),
        (('{".tsv":', '{".json":'), "must not reuse the existing name '.json'"),
        (('{".tsv":', '{"tsv":'), "must have a suffix such as '.csv' as its key"),
        (("SourceKind(open=Captions, holds_images=False)", "Captions"), "kinds.SourceKind; got"),
    ],
    ids=["faults", "pickle", "record", "error", "exists", "suffix", "value"],
)
def test_a_slip_in_a_source_is_named(
    pages: dict[str, str],
    tsv: Path,
    shapes_dir: Path,
    capsys: pytest.CaptureFixture[str],
    slip: tuple[str, str],
    message: str,
) -> None:
    path = Path(pages["my_source.py"])
    assert slip[0] in path.read_text()
    path.write_text(path.read_text().replace(*slip))
    said = refused(capsys, "data", "verify", "--plugin", path, "--data", tsv, "--images", shapes_dir)
    assert f"plug-in {path}" in said
    assert any(part in said for part in message.split("|"))


# 5. A benchmark


def test_a_benchmark_of_a_plug_in_is_verified_answered_scored_and_in_the_table(
    pages: dict[str, str], student_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "root" / "lights"
    folder.mkdir(parents=True)
    Image.new("RGB", (32, 32), (200, 30, 30)).save(folder / "a.png")
    rows = [{"image": "a.png", "text": "Is it red?", "label": label} for label in ("yes", "no")]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--plugin", pages["my_benchmark.py"], "--benchmark", "lights", "--data", str(tmp_path / "root")]
    assert main(["data", "verify", *given]) == 0
    assert "lights: ready, 2 questions" in capsys.readouterr().out
    assert main(["eval", "--model", str(student_dir), *given, "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "lights" / "summary.json").read_text())
    assert summary["value"] == 50.0  # whatever it says, one of yes and no is right
    assert "| Lights |" in (tmp_path / "out" / "table.md").read_text()
    assert "no benchmark 'lights'" in refused(capsys, "data", "verify", *given[2:])
    assert "lights" not in OURS.benchmarks
    (folder / "questions.jsonl").write_text('{"image": "a.png", "text": "Is it red?"}\n')
    assert main(["data", "verify", *given]) == 1
    assert "entry 1 has no 'label'" in capsys.readouterr().out


# 6. A divergence

HELLINGER = """
import torch
from llava_kd.losses import head_loss, reference
from llava_kd.losses.divergence import Divergence
torch.manual_seed(0)
heads = [torch.randn(11, 6), torch.randn(11, 5)]
def run(loss):
    h = torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float32).requires_grad_()
    t = torch.randn(7, 5, generator=torch.Generator().manual_seed(2))
    out = loss(h, heads[0], torch.zeros(7, dtype=torch.long), ce_weight_N=torch.zeros(7),
        teacher_NE=t, teacher_head_UE=heads[1], kl_weight_N=torch.ones(7), temperature=2.0,
        divergence=Divergence(KIND))
    out.loss.backward()
    return out.kl_N, h.grad
def of(kind):
    global KIND
    KIND = kind
    return run(reference.head_loss), run(head_loss.head_loss)
plain, fast = of("hellinger")
torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-6)
s = (torch.randn(7, 6, generator=torch.Generator().manual_seed(1)) @ heads[0].T / 2).softmax(1)
t = (torch.randn(7, 5, generator=torch.Generator().manual_seed(2)) @ heads[1].T / 2).softmax(1)
torch.testing.assert_close(plain[0], 4 * ((s.sqrt() - t.sqrt()) ** 2).sum(1) / 2, rtol=1e-5, atol=1e-6)
from llava_kd.assembly.settings import load
found = load(sys.argv[1], ["--objective.response_kl.divergence=hellinger"])
assert found.objective.terms["response_kl"].head_request().divergence.kind == "hellinger"
"""


def test_a_divergence_is_its_formula_and_its_slope(stage: Stage, tmp_path: Path) -> None:
    copy = Copy(tmp_path / "copy", 6)
    assert len(copy.touched) == 2
    done = copy.run(HELLINGER, str(stage("run")))
    assert done.returncode == 0, done.stderr[-2000:]
    slip = Copy(tmp_path / "slip", 6, leave_out="llava_kd/losses/kernels/row_torch.py")
    assert slip.run(HELLINGER, str(stage("run"))).returncode != 0  # a form that lacks the kind is not silent


# 7. A logged figure


def test_a_figure_is_logged_and_changes_nothing(stage: Stage, pages: dict[str, str]) -> None:
    plain = train(stage("plain", distilled=False), "without")
    objective = CE | {"visual_norm": {}}
    config = stage("seen", distilled=False, plugins=[pages["my_figure.py"]], objective=objective)
    seen = train(config, "with")
    assert all(line["visual_norm"] > 0 for line in logged(seen))
    assert [line["loss"] for line in logged(seen)] == [line["loss"] for line in logged(plain)]
    assert equal(weights(seen), weights(plain))


# 9. An engine setting


def test_a_setting_of_the_engine_reaches_it(stage: Stage, tmp_path: Path) -> None:
    copy = Copy(tmp_path / "copy", 9)
    assert len(copy.touched) == 2
    code = f"import torch; {CLI}; print(torch.are_deterministic_algorithms_enabled())"
    for value in ("true", "false"):
        words = ["train", str(stage("run", max_steps=1)), f"--output_dir={tmp_path / value}"]
        done = copy.run(code, *words, f"--engine.deterministic={value}")
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.split()[-1].lower() == value


# 10. A template


def test_a_template_of_a_plug_in_is_trained_on_and_written_into_the_student(
    stage: Stage, pages: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = stage("run", distilled=False, plugins=[pages["my_template.py"]], template="plain_chat")
    output = train(config, "out")
    assert "template of the student: plain_chat" in capsys.readouterr().err
    processor = load_stock(str(output / "model")).processor
    messages = [{"role": "user", "content": "What is it?"}]
    asked = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked == "Q: What is it?\nA:"
    assert main(["check", str(config)]) == 0
    assert "plain_chat" in capsys.readouterr().out
    said = refused(capsys, "train", config, "--plugins=[]", f"--output_dir={output}2")
    assert "`data.template` must be auto or one of" in said


def test_a_template_whose_end_is_no_token_is_refused(
    stage: Stage, pages: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(pages["my_template.py"])
    path.write_text(path.read_text().replace('after_answer="\\n"', 'end_token="<|nowhere|>"'))
    config = stage("run", distilled=False, plugins=[str(path)], template="plain_chat")
    assert "ends answers with '<|nowhere|>', which is no token" in refused(capsys, "train", config)


def test_no_change_needs_more_than_three_files() -> None:
    for number in range(1, 11):
        said = section(number).split("Files:")[1].split("\n\n")[0]
        assert said.count("`") // 2 <= 4, number


def test_the_tables_of_the_package_are_never_changed(pages: dict[str, str]) -> None:
    before = {name: dict(table) for name, table in vars(OURS).items() if name != "plugins"}
    longer = with_plugins(list(pages.values()))
    for name, table in before.items():
        assert dict(vars(OURS)[name]) == table
        assert len(vars(longer)[name]) > len(table)
