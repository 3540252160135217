"""A stage that tunes a teacher: centroids as the stock model gives them, the run on them, what is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_kd.assembly.parts.data import side_of
from llava_kd.assembly.parts.tuning.centroids import StoredCentroids
from llava_kd.batch import IGNORE_INDEX
from llava_kd.cli import main
from llava_kd.config import DataConfig
from llava_kd.data.pixels.images import decode
from llava_kd.data.sources.llava_json import LlavaJson
from llava_kd.models.files.checkpoint import load_stock

T = 2.0
MCMI = {"weight": 1.0, "temperature": T, "clamp": 100.0}
PLAIN = {"cross_entropy": {"weight": 1.0}}


@pytest.fixture
def tune(stage: Callable[..., Path], tmp_path: Path) -> Callable[..., int]:
    """`train`, and `data centroids` where `out` is given, of a stage that reads `centroids`."""

    def call(*words: str, out: str | None = None, name: str = "run", **changes: object) -> int:
        terms = {**PLAIN, "mcmi": {**MCMI, "centroids": str(tmp_path / "centroids")}}
        config = str(stage(name, **{"distilled": False, "objective": terms, **changes}))
        if out is None:
            return main(["train", config, *words])
        return main(["data", "centroids", config, "--out", str(tmp_path / out), *words])

    return call


def figures(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def stock_rows(directory: Path, data: Path) -> tuple[Tensor, Tensor]:
    """Logits [N, V] and labels [N] of every answer token, by transformers' own forward, record by record."""
    parts = load_stock(str(directory), dtype=torch.float64)
    config = DataConfig(path=str(data), template="vicuna", max_length=512)
    side = side_of(parts.processor, parts.stock.config, config)
    source, found = LlavaJson(data, data.parent), []
    for number in range(len(source)):
        encoded = side.encoder()(source.record(number))
        pixels = side.transform(decode(source.image_bytes(number, 0))).double()
        with torch.no_grad():
            logits_TV = parts.stock.eval()(
                input_ids=encoded.ids[None],
                pixel_values=pixels[None],
                attention_mask=torch.ones(1, len(encoded.ids)),
            ).logits[0]
        rows = (encoded.labels[1:] != IGNORE_INDEX).nonzero().squeeze(1)
        found.append((logits_TV[rows], encoded.labels[1:][rows]))
    logits, labels = zip(*found, strict=True)
    return torch.cat(logits), torch.cat(labels)


def test_centroids_are_the_stock_models_means_and_a_run_subtracts_its_information(
    tune, tmp_path: Path, shapes_dir: Path, student_dir: Path, capsys
) -> None:
    """One step over all records without moving: the log is what the stock model says, by hand."""
    assert tune(out="centroids") == 0
    told = capsys.readouterr().out
    stored = StoredCentroids.read(tmp_path / "centroids")
    logits_NV, labels_N = stock_rows(student_dir, shapes_dir / "instructions.json")
    counts = Counter(labels_N.tolist())
    frequent = [token for token, number in counts.most_common() if number >= 10]
    assert sorted(stored.tokens_K.tolist()) == sorted(frequent)
    p_NV = (logits_NV / T).softmax(1)
    expected_N = torch.zeros(len(labels_N), dtype=torch.float64)
    for k, token in enumerate(stored.tokens_K.tolist()):
        own = labels_N == token
        q_V = p_NV[own].mean(0)
        torch.testing.assert_close(stored.centroids_KV[k].double(), q_V, rtol=1e-4, atol=1e-7)
        assert int(stored.rows_K[k]) == counts[token]
        expected_N[own] = (p_NV[own] * (p_NV[own].log() - q_V.log())).sum(1)
    ce = -logits_NV.log_softmax(1).gather(1, labels_N[:, None]).mean()
    assert stored.cross_entropy == pytest.approx(float(ce), rel=1e-5)
    covered_N = torch.isin(labels_N, torch.tensor(frequent))
    assert f"contain {float(expected_N[covered_N].mean()):.5f} nats" in told
    assert f"after {float(covered_N.double().mean()):.1%} of {len(labels_N)} answer rows" in told
    assert tune(global_batch_size=30, micro_batch_size=10, max_steps=1, lr=1e-9) == 0
    (line,) = figures(tmp_path / "run")
    information = float(expected_N.mean())
    assert information > 1e-5
    assert line["cross_entropy"] == pytest.approx(float(ce), rel=1e-4)
    assert line["mcmi"] == pytest.approx(-information, rel=1e-3)
    assert line["loss"] == pytest.approx(line["cross_entropy"] + MCMI["weight"] * line["mcmi"], rel=1e-5)


@pytest.mark.parametrize("words", [(), ("--student.lora.rank=4",)], ids=["whole", "adapters"])
def test_tuning_raises_what_answers_tell_of_their_pictures(
    tune, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """Against the same steps with a weight of 0, where the term is measured alone."""
    assert tune(out="centroids") == 0
    told = {}
    for weight in (0.0, 10.0):
        term = {**MCMI, "weight": weight, "margin": 5.0, "centroids": str(tmp_path / "centroids")}
        steps = {"global_batch_size": 30, "micro_batch_size": 10, "max_steps": 8, "lr": 3e-3}
        assert tune(*words, name=f"run{weight:g}", objective={**PLAIN, "mcmi": term}, **steps) == 0
        told[weight] = [-line["mcmi"] for line in figures(tmp_path / f"run{weight:g}")]
    assert told[10.0][0] == pytest.approx(told[0.0][0], rel=1e-6)
    assert told[10.0][-1] > 1.2 * max(told[0.0][-1], told[10.0][0])


def test_a_weight_that_unlearns_the_answers_stops_the_run_and_keeps_no_step(
    tune, tmp_path: Path, capsys
) -> None:
    assert tune(out="centroids") == 0
    terms = {**PLAIN, "mcmi": {**MCMI, "weight": 1e4, "centroids": str(tmp_path / "centroids")}}
    assert tune(objective=terms, max_steps=200, lr=2e-2) == 2
    told = capsys.readouterr().err
    assert "the model unlearns its answers: their cross-entropy, a running mean over steps, is" in told
    assert "Lower objective.mcmi.weight or clamp" in told
    assert not (tmp_path / "run" / "model").exists()


def test_another_model_tokenizer_temperature_or_other_data_are_refused(
    tune, tmp_path: Path, teacher_dir: Path, shapes_dir: Path, capsys
) -> None:
    assert tune(out="centroids") == 0
    for words, named in {
        (f"--student.checkpoint={teacher_dir}",): "weights of the model",
        (f"--data.path={shapes_dir / 'captions.json'}",): "data",
        ("--objective.mcmi.temperature=4",): "objective.mcmi.temperature: 2 there, 4 here",
        ("--data.template=plain",): "data.template",
        ("--data.max_length=300",): "data.max_length",
    }.items():
        assert tune(*words) == 2, words
        told = capsys.readouterr().err
        assert "was written with other inputs" in told, told
        assert named in told, told
    words = [f"--data.path={shapes_dir / 'captions.json'}"]
    assert main(["check", str(tmp_path / "run.yaml"), *words]) == 2
    assert "was written with other inputs" in capsys.readouterr().err


def test_what_the_term_cannot_do_without_is_asked_for(tune, tmp_path: Path, capsys) -> None:
    (tmp_path / "there").write_text("x")
    alone = {"mcmi": MCMI}
    for words, more, said in (
        ((), {"objective": {**PLAIN, "mcmi": MCMI}}, "`objective.mcmi.centroids` is null"),
        ((), {"objective": alone}, "add objective.cross_entropy with a weight above 0"),
        ((), {}, "cannot be read (FileNotFoundError"),
        (("--objective.mcmi.weight=-0.1",), {}, "`objective.mcmi.weight` must not be negative; got -0.1"),
        (("--objective.mcmi.clamp=0",), {}, "`objective.mcmi.clamp` must be more than 0; got 0"),
        (("--objective.mcmi.temperature=0",), {}, "`objective.mcmi.temperature` must be more than 0"),
        (("--objective.mcmi.margin=0",), {}, "`objective.mcmi.margin` must be more than 0"),
        ((), {"out": "there"}, "exists: give another --out"),
        (("--least=100000",), {"out": "new"}, "must occur 100000 times; in the 30 records"),
        ((), {"out": "new", "objective": PLAIN}, "objective.mcmi, which this stage does not have"),
    ):
        assert tune(*words, **more) == 2, (words, more)
        assert said in capsys.readouterr().err, said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("tokens"), "tokens"),
        (lambda t: t.update(centroids=t["centroids"] * 2), "each centroid must contain probabilities"),
        (
            lambda t: t.update(centroids=t["centroids"] * float("nan")),
            "each centroid must contain probabilities",
        ),
        (lambda t: t.update(tokens=t["tokens"] * 0), "tokens must be different"),
        (lambda t: t.update(tokens=t["tokens"] + 10**6), "tokens must be different and in the vocabulary"),
        (lambda t: t.update(centroids=t["centroids"][1:].clone()), "centroids \\["),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: Callable[[dict], object], said: str) -> None:
    path, header = (
        tmp_path / "file",
        {"centroids": json.dumps({"format": 1, "cross_entropy": 1, "identity": {}})},
    )
    tensors = {
        "tokens": torch.tensor([3, 1]),
        "centroids": torch.full((2, 5), 0.2),
        "rows": torch.tensor([9, 7]),
    }
    save_file(tensors, path, header)
    assert StoredCentroids.read(path).tokens_K.tolist() == [3, 1]
    change(tensors)
    save_file(tensors, path, header)
    with pytest.raises(ValueError, match=f"cannot be read .*{said}"):
        StoredCentroids.read(path)
    save_file(load_file(path), path)
    with pytest.raises(ValueError, match="cannot be read"):
        StoredCentroids.read(path)
