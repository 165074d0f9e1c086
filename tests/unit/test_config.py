"""What a user writes is what runs, or is refused with place, reason and fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_trainer.config.identity import difference, identity_fields
from lora_trainer.config.load import load_config, to_yaml
from lora_trainer.config.names import PEER_NAMES
from lora_trainer.config.schema import RunConfig
from lora_trainer.config.structure import all_keys
from lora_trainer.errors import ConfigError, ExitCode

GOOD = """\
name: my-cat
model: {path: base}
data: {dir: images}
train: {max_steps: 10}
"""


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return file


def loaded(tmp_path: Path, text: str = GOOD, *overrides: str) -> RunConfig:
    return load_config(written(tmp_path, text), overrides)


def refusal(tmp_path: Path, text: str = GOOD, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, text, *overrides)
    assert caught.value.exit_code == ExitCode.CONFIG
    return str(caught.value)


def test_defaults(tmp_path: Path) -> None:
    config = loaded(tmp_path)
    assert config.optimizer.type == "adamw"
    assert config.optimizer.lr == 1e-4
    assert config.lr_scheduler.type == "constant"
    assert config.data.resolution == 512


def test_unknown_key_names_line_and_neighbour(tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD + "optimizer:\n  type: adamw\n  wieght_decay: 0.1\n")
    assert "run.yaml:7" in message
    assert "`optimizer.wieght_decay` is not a setting" in message
    assert "did you mean `weight_decay`" in message


@pytest.mark.parametrize(("peer", "ours"), sorted(PEER_NAMES.items()))
def test_names_of_other_trainers_point_to_ours(tmp_path: Path, peer: str, ours: str) -> None:
    key = ours.partition(":")[0].replace("[]", "")
    assert key in all_keys() or key.rpartition(".")[0] in all_keys(), f"{ours} is no setting"
    if peer not in RunConfig.model_fields:
        assert ours.partition(":")[0] in refusal(tmp_path, GOOD + f"{peer}: 1\n")


def test_all_problems_in_one_report(tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD + "adapter: {rank: -1, alhpa: 2}\nseed: x\noptimizer: {lr: 0}\n")
    for said in ("adapter.rank", "did you mean `alpha`", "`seed`", "optimizer.lr"):
        assert said in message


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".0001", "'1e-4'", "1e-04", "+1e-4", "100e-6"])
def test_spellings_of_a_learning_rate(tmp_path: Path, text: str) -> None:
    assert loaded(tmp_path, GOOD + f"optimizer: {{lr: {text}}}\n").optimizer.lr == 1e-4


@pytest.mark.parametrize("text", ["yes", "true", "1e-4x", "1,000", ".inf", ".nan", "-1e-4", "0", "1", "[1e-4]", "null"])
def test_what_is_no_learning_rate(tmp_path: Path, text: str) -> None:
    assert "optimizer.lr" in refusal(tmp_path, GOOD + f"optimizer: {{lr: {text}}}\n")


@pytest.mark.parametrize(("text", "value"), [("10", 10), ("010", 10), ("'10'", 10), ("10.0", 10), ("1e3", 1000)])
def test_spellings_of_a_count(tmp_path: Path, text: str, value: int) -> None:
    assert loaded(tmp_path, GOOD.replace("max_steps: 10", f"max_steps: {text}")).train.max_steps == value


def test_yaml_1_2_keeps_words(tmp_path: Path) -> None:
    text = GOOD.replace("my-cat", "no") + "sample: {prompts: [yes, off, 'on']}\n"
    config = loaded(tmp_path, text)
    assert config.name == "no"
    assert [p.prompt for p in config.sample.prompts] == ["yes", "off", "on"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + "name: other\n", "duplicate key"),
        (GOOD + "\tseed: 1\n", "not valid YAML"),
        ("", "a configuration is a mapping"),
        ("- a\n", "a configuration is a mapping"),
        (GOOD + "optimizer: [", "not valid YAML"),
        (GOOD + "x: !!python/object/apply:os.system [ls]\n", "a YAML tag"),
    ],
)
def test_broken_yaml(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text)


def test_missing_file_and_encoding(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(GOOD.replace("my-cat", "Bär").encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_required_sections(tmp_path: Path) -> None:
    message = refusal(tmp_path, "name: x\n")
    for key in ("`model` is required", "`data` is required", "`train` is required"):
        assert key in message


PHASES = "lr_scheduler: {{type: phases, phases: [{{type: constant, steps: 3}}, {}]}}\n"


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("lr_scheduler: {type: linear, num_cycles: 2}\n", "choose a type that has it: cosine, cosine_with_restarts"),
        ("lr_scheduler: {type: constant, warmup_steps: 10}\n", "constant_with_warmup"),
        ("lr_scheduler: {type: cosin}\n", "did you mean `cosine`"),
        ("lr_scheduler: {warmup_steps: 3}\n", "`lr_scheduler` needs a `type`"),
        ("lr_scheduler: {type: constant_with_warmup}\n", "`lr_scheduler.warmup_steps` is required"),
        (PHASES.format("{type: linear, steps: 3, power: 2}"), "choose a type that has it: polynomial"),
        (PHASES.format("{typ: linear, steps: 3}"), "`lr_scheduler.phases[1]` needs a `type`"),
        (PHASES.format("{type: linear}"), "`lr_scheduler.phases[1].steps` is required"),
        ("lr_scheduler: {type: phases, phases: []}\n", "at least 1 item"),
        ("lr_scheduler: {type: linear, warmup_steps: 0.05}\n", '0.05 of the run is "5%"'),
        ("optimizer: {type: adamw, momentum: 0.9}\n", "choose a type that has it: sgd, rmsprop"),
        ("optimizer: {type: sgd}\n", "`optimizer.lr` is required"),
        ("data: {crops_per_image: 3, dir: x}\n", "no effect with `crop: center`"),
        ("data: {dir: x, sources: [{dir: y}]}\n", "exactly one of `data.dir` and `data.sources`"),
        ("sample: {every_steps: 10}\n", "no effect without `sample.prompts`"),
        ("adapter: {use_dora: true, use_rslora: true}\n", "use_rslora"),
        ("train: {max_steps: 10, epochs: 2}\n", "exactly one of"),
        ("train: {batch_size: 2}\n", "exactly one of"),
        ("checkpoint: {keep_last: 1}\n", "checkpoint.keep_last"),
        ("checkpoint: {every_steps: 0}\n", "write null for never"),
        ("name: ../x\n", "becomes a folder's name"),
        ("name: a/b\n", "becomes a folder's name"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_fix(tmp_path: Path, extra: str, said: str) -> None:
    key = extra.partition(":")[0]
    kept = "".join(line + "\n" for line in GOOD.splitlines() if not line.startswith(key + ":"))
    assert said in refusal(tmp_path, kept + extra)


def test_overrides_apply_from_left_to_right(tmp_path: Path) -> None:
    config = loaded(tmp_path, GOOD, "optimizer.lr=1e-3", "optimizer.lr=2e-3", "adapter={rank: 8, alpha: 1}")
    assert config.optimizer.lr == 2e-3
    assert (config.adapter.rank, config.adapter.alpha) == (8, 1)


def test_an_override_of_the_length_names_the_line_that_is_needed(tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD, "train.epochs=3")
    assert "train.max_steps=null" in message
    assert loaded(tmp_path, GOOD, "train.epochs=3", "train.max_steps=null").train.epochs == 3


@pytest.mark.parametrize("wrong", ["optimizer.lr", "=3", "a..b=3", "name.first=x", "optimizer.lr=[1"])
def test_wrong_overrides(tmp_path: Path, wrong: str) -> None:
    assert wrong.partition("=")[0] in refusal(tmp_path, GOOD, wrong)


def test_a_wrong_override_is_placed_on_the_command_line(tmp_path: Path) -> None:
    assert "command line, seed=x" in refusal(tmp_path, GOOD, "seed=x")


def test_the_resolved_config_reruns_the_run(tmp_path: Path) -> None:
    config = loaded(tmp_path, GOOD, "lr_scheduler={type: cosine, warmup_steps: 5%}", "sample.prompts=[a, b]")
    again = loaded(tmp_path, to_yaml(config))
    assert again == config
    assert to_yaml(again) == to_yaml(config)


def test_identity_leaves_out_what_may_change(tmp_path: Path) -> None:
    before = identity_fields(loaded(tmp_path))
    may_change = [
        "sample.prompts=[x]",
        "checkpoint.every_steps=7",
        "name=other",
        "data.dir=elsewhere",
        "export.dtype=bf16",
    ]
    assert identity_fields(loaded(tmp_path, GOOD, *may_change)) == before
    now = identity_fields(loaded(tmp_path, GOOD, "optimizer.lr=2e-4", "lr_scheduler={type: linear}"))
    changed = difference(before, now)
    assert "optimizer.lr: 0.0001 -> 0.0002" in changed
    assert "lr_scheduler.type: constant -> linear" in changed


IN_LISTS = ("data.sources", "sample.prompts", "lr_scheduler.phases", "optimizer.groups")


def test_every_key_one_edit_away_is_refused(tmp_path: Path) -> None:
    keys = all_keys()
    assert len(keys) > 60
    for key in keys:
        section, _, name = key.rpartition(".")
        if section.startswith(IN_LISTS) or name == "type":
            continue
        misspelt = f"{section}.{name}x" if section else f"{name}x"
        text = GOOD + "lr_scheduler: {type: cosine}\n"
        assert f"`{misspelt}`" in refusal(tmp_path, text, f"{misspelt}=1")
