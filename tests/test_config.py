"""Settings: what loads, what overrides do, and the one line that a mistake gets."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import write_stage

from llava_kd.assembly.settings import load
from llava_kd.config import TrainConfig, dump


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A distilled stage; nothing it names exists, for `load` reads only YAML."""
    return write_stage(tmp_path / "run", data=Path("d"), student=Path("s"), teacher=Path("t"))


def message(recipe: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the callers look at the message
        load(recipe, overrides)
    text = str(caught.value)
    assert text.startswith(f"{recipe}: ")
    assert "\n" not in text
    return text


def test_overrides_win_over_the_file(recipe: Path) -> None:
    config = load(recipe, ["--optim.lr=1e-4", "--student.checkpoint=other", "--objective.relation=null"])
    assert config.optim.lr == 1e-4
    assert config.student.checkpoint == "other"
    assert config.objective.relation is None
    assert config.objective.response_kl is not None


def test_a_path_at_home_is_found_there(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell reads YAML, and bash leaves ~ as it is behind a sign: a folder of that name was made."""
    monkeypatch.setenv("HOME", "/home/me")
    config = load(recipe, ["--output_dir=~/runs/a", "--student={checkpoint: ~/m}", "--data.images=a/~/b"])
    assert (config.output_dir, config.student.checkpoint) == ("/home/me/runs/a", "/home/me/m")
    assert config.data.images == "a/~/b"
    config = load(recipe, ["--data={sources: [{path: ~/a.json}]}"])
    assert [source.path for source in config.data.sources] == ["/home/me/a.json"]


def test_an_override_may_open_a_section_that_the_file_does_not_have(recipe: Path) -> None:
    config = load(recipe, ["--optim.lr_by_part.language_model=3e-5"])
    assert config.optim.lr_by_part == {"language_model": 3e-5}


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("--optim.lr_by_part.language_model=3e-5", "--optim.betas=[0.9, 0.95]", "--max_steps=null"),
        ("--objective={cross_entropy: {weight: 2}}", "--teacher=null"),
        ("--objective.visual_kl.divergence=jsd", "--objective.relation.tap=hidden", "--seed=7"),
        ("--objective.visual_kl.temperature=std", "--objective.response_kl.temperature=4"),
    ],
    ids=["recipe", "lists and maps", "no teacher", "choices", "a number or a word"],
)
def test_what_dump_writes_loads_back_equal(recipe: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    config = load(recipe, overrides)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump(config))
    assert load(copy) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "--optim.lrr=1",
            "no setting `lrr` in `optim` (did you mean `lr`?); the settings are lr, lr_by_part",
        ),
        ("--objective.visual_kl.temprature=2", "in `objective.visual_kl` (did you mean `temperature`?)"),
        ("--trainabel=[]", "no setting `trainabel` (did you mean `trainable`?); the settings are output_dir"),
        ("--zebra=1", "no setting `zebra`; the settings are"),
        (
            "--engine.kind=fsdp",
            "`engine.kind` must be one of auto, single, ddp, fsdp2, deepspeed; got 'fsdp'",
        ),
        ("--engine.zero_stage=4", "`engine.zero_stage` must be one of 1, 2, 3; got 4"),
    ],
)
def test_an_unknown_name_is_answered_with_the_known_ones(recipe: Path, override: str, words: str) -> None:
    assert words in message(recipe, override)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--optim.lr=high", "`optim.lr` must be a number; got 'high'"),
        ("--optim.lr=true", "`optim.lr` must be a number; got True"),
        ("--optim.lr=null", "`optim.lr` must be a number; got None"),
        ("--global_batch_size=4.5", "`global_batch_size` must be a whole number; got 4.5"),
        ("--seed=true", "`seed` must be a whole number; got True"),
        ("--log.progress=3", "`log.progress` must be true or false; got 3"),
        ("--output_dir=[a]", "`output_dir` must be text; got ['a']"),
        ("--trainable=language_model", "`trainable` must be a list; got 'language_model'"),
        ("--optim.betas=[0.9]", "`optim.betas` must be a list of 2; got [0.9]"),
        ("--optim.lr_by_part=3", "`optim.lr_by_part` must be a section of `name: value` lines; got 3"),
        ("--optim.lr_by_part.language_model=x", "`optim.lr_by_part.language_model` must be a number"),
        ("--optim=3", "`optim` must hold `key: value` lines; got 3"),
        ("--objective.response_kl=on", "`objective.response_kl` must hold `key: value` lines; got True"),
        ("--optim={}", "`optim.lr` is missing"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_key(recipe: Path, override: str, words: str) -> None:
    assert words in message(recipe, override)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--optim.lr=0", "`optim.lr` must be more than 0"),
        ("--optim.lr_by_part.language_model=-1", "`optim.lr_by_part.language_model` must be more than 0"),
        ("--optim.lr=.nan", "`optim.lr` must be finite"),
        (
            "--objective.response_kl.temperature=sdt",
            "`objective.response_kl.temperature` must be a number or std; got 'sdt' (did you mean `std`?)",
        ),
        ("--objective.response_kl.temperature=0", "`objective.response_kl.temperature` must be more than 0"),
        ("--objective.relation.weight=-1", "`objective.relation.weight` must not be negative"),
        ("--optim.warmup_ratio=1.5", "`optim.warmup_ratio` must be from 0 to 1"),
        ("--optim.betas=[0.9, 2]", "`optim.betas[1]` must be from 0 to 1"),
        ("--data.max_bad_rate=2", "`data.max_bad_rate` must be from 0 to 1"),
        ("--checkpoint.every=0", "`checkpoint.every` must be more than 0"),
        ("--checkpoint.keep=0", "`checkpoint.keep` must be more than 0"),
        ("--micro_batch_size=0", "`micro_batch_size` must be more than 0"),
        ("--data.num_workers=-1", "`data.num_workers` must not be negative"),
        ("--epochs=0", "`epochs` must be more than 0"),
    ],
)
def test_a_number_out_of_range_is_named_with_its_key(recipe: Path, override: str, words: str) -> None:
    assert words in message(recipe, override)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--teacher=null", "has distillation terms but `teacher` is null; set teacher.checkpoint"),
        ("--objective={cross_entropy: {}}", "`teacher` is set but no term of `objective` uses it"),
        ("--objective={}", "`objective` has no term; give it at least one"),
        ("--trainable=[]", "`trainable` is empty"),
        ("--trainable=[projector]", "`trainable` must name parts of ['vision_tower'"),
        ("--optim.lr_by_part.head=1", "`optim.lr_by_part` must name parts of ['vision_tower'"),
        ("--micro_batch_size=3", "`global_batch_size` (4) must be a multiple of `micro_batch_size` (3)"),
        ("--student.vision_tower=x", "`student` needs either `checkpoint`, or both"),
        ("--student={vision_tower: x}", "`student` needs either `checkpoint`, or both"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(recipe: Path, override: str, words: str) -> None:
    assert words in message(recipe, override)


@pytest.mark.parametrize("word", ["lr=1", "--lr", "optim.lr", "--optim.lr"])
def test_an_override_without_its_form_is_refused(recipe: Path, word: str) -> None:
    assert "an override looks like --optim.lr=1e-4" in message(recipe, word)


def test_a_key_given_twice_is_refused(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + "seed: 1\nseed: 2\n")
    assert "the key ['seed'] is given twice" in message(recipe)


@pytest.mark.parametrize("text", ["", "- 1\n", "a: [1\n", "a: !!python/name:os.system\n"])
def test_a_file_that_is_no_mapping_is_refused(recipe: Path, text: str) -> None:
    recipe.write_text(text)
    message(recipe)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config file .*nothing\.yaml"):
        load(tmp_path / "nothing.yaml")


def test_a_loaded_tree_is_frozen(recipe: Path) -> None:
    config: TrainConfig = load(recipe)
    with pytest.raises(AttributeError):
        config.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--objective={cross_entropy: {weight: 0}}", "--teacher=null"], "weights of `objective` are all 0"),
        (["--trainable=[language_model, language_model]"], "`trainable` must name 'language_model' once"),
        (
            ["--trainable=[multi_modal_projector]", "--optim.lr_by_part={language_model: 1e-5}"],
            "a rate for ['language_model'], but `trainable` does not name it",
        ),
        (["--data.image_cache_mb=-1"], "`data.image_cache_mb` must not be negative"),
        (["--data.packing={max_tokens: 64, packs_per_step: 0}"], "packs_per_step` must be more than 0"),
        (["--objective.response_kl={mix: 1.0}"], "`objective.response_kl.mix` must be between 0 and 1"),
        (["--optim.betas=[0.9, 1.0]"], "`optim.betas[1]` must be below 1"),
        (["--engine.timeout_minutes=1e300"], "`engine.timeout_minutes` must be at most 525600"),
        (["--epochs=1e300"], "`epochs` must be at most 1e+12"),
        (["--seed=99999999999999999999"], "`seed` must be at most"),
        (["--output_dir="], "`output_dir` must be text"),
        (["--output_dir=' '"], "`output_dir` is empty"),
        (["--student.lora={targets: []}"], "`student.lora.targets` is empty"),
        (
            ["--trainable=[language_model]", "--objective={relation: {tap: projector}}"],
            "no term of `objective` reads it (relation)",
        ),
    ],
)
def test_settings_that_would_train_nothing_or_overflow_are_named(
    recipe: Path, overrides: list[str], words: str
) -> None:
    assert words in message(recipe, *overrides)
