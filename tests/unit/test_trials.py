"""The trials of a configuration: names, order, draws, and what is refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lora_trainer.config.identity import difference, identity_fields
from lora_trainer.config.load import load_config
from lora_trainer.config.trials import TrialConfig, arm_name, is_path_safe, load_sweep
from lora_trainer.errors import ConfigError

GOOD = """
name: compare
seed: 5
model: {path: base}
data: {dir: images}
train: {max_steps: 100}
validation: {fraction: 0.2}
"""


def trials(tmp_path: Path, sweep: str, *overrides: str) -> list[TrialConfig]:
    file = tmp_path / "sweep.yaml"
    file.write_text(f"{GOOD}sweep:\n{sweep}")
    return load_sweep(file, overrides)[1]


def refusal(tmp_path: Path, sweep: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        trials(tmp_path, sweep, *overrides)
    return str(caught.value)


def test_trials_grid_random_and_seeds(tmp_path: Path) -> None:
    made = trials(
        tmp_path,
        """
  trials:
    gentle: {optimizer.lr: 3e-5}
    wide: [adapter.rank=32, "lr_scheduler={type: rex}"]
  grid:
    lr_scheduler: [{type: constant}, {type: cosine, warmup_steps: "5%"}]
    optimizer.lr: [1e-4, 3e-4]
  random: {num: 2, optimizer.lr: {log_uniform: [1e-5, 1e-3]}, adapter.rank: {choice: [4, 8]}}
  seeds: [1, 2]
""",
    )
    first = [trial for trial in made if trial.seed == 1]
    assert [trial.arm for trial in first] == [
        "gentle",
        "wide",
        "constant-lr1e-4",
        "constant-lr3e-4",
        "cosine-warmup_steps5pct-lr1e-4",
        "cosine-warmup_steps5pct-lr3e-4",
        "random1",
        "random2",
    ]
    assert [trial.setting for trial in first[:6]] == [
        "base",
        "rank32-rex",
        *["constant"] * 2,
        *["cosine-warmup_steps5pct"] * 2,
    ]
    assert [trial.name for trial in made] == [f"{trial.arm}-seed{seed}" for seed in (1, 2) for trial in first]
    wide = first[1].config
    assert (wide.adapter.rank, wide.lr_scheduler.type, wide.seed, wide.sweep) == (32, "rex", 1, None)
    assert wide.output_dir == "runs/compare/trials"
    assert wide.data.cache_dir == "runs/.cache"
    assert all(1e-5 <= trial.config.optimizer.lr <= 1e-3 for trial in first[6:])


def test_a_trial_differs_from_the_sweep_in_its_overrides_alone(tmp_path: Path) -> None:
    one, other = trials(tmp_path, "  grid: {optimizer.lr: [1e-4, 3e-4]}")
    assert difference(identity_fields(one.config), identity_fields(other.config)) == ["optimizer.lr: 0.0001 -> 0.0003"]
    assert one.seed == 5


def test_what_is_added_later_renames_and_redraws_nothing(tmp_path: Path) -> None:
    draws = "optimizer.lr: {log_uniform: [1e-5, 1e-3]}"
    few = trials(tmp_path, f"  random: {{num: 2, {draws}}}\n  seeds: [1]")
    many = trials(tmp_path, f"  random: {{num: 4, adapter.rank: {{choice: [2, 3]}}, {draws}}}\n  seeds: [1, 2]")
    assert [t.name for t in few] == [t.name for t in many if t.seed == 1][:2]
    assert [t.overrides["optimizer.lr"] for t in few] == [t.overrides["optimizer.lr"] for t in many][:2]


def test_no_arm_is_drawn_twice_and_what_was_drawn_stays(tmp_path: Path) -> None:
    """Of 60 draws among 101 values of four digits many would collide; those before the first that did are as ever."""
    draws = "optimizer.lr: {uniform: [0.1, 0.11]}"
    many = [trial.overrides["optimizer.lr"] for trial in trials(tmp_path, f"  random: {{num: 60, {draws}}}")]
    assert len(set(many)) == 60
    plain = [float(f"{random.Random(f'0|{index}|optimizer.lr').uniform(0.1, 0.11):.4g}") for index in range(1, 61)]
    assert len(set(plain)) < 50
    first = next(index for index in range(60) if plain[index] in plain[:index])
    assert many[:first] == plain[:first]
    few = trials(tmp_path, f"  random: {{num: 20, {draws}}}")
    assert [trial.overrides["optimizer.lr"] for trial in few] == many[:20]


def test_a_space_that_is_used_up_is_told_with_its_size(tmp_path: Path) -> None:
    space = "adapter.rank: {choice: [4, 8, 4, 16]}, lr_scheduler: {choice: [{type: constant}, {type: rex}]}"
    made = trials(tmp_path, f"  random: {{num: 6, {space}}}")
    assert len({str(trial.overrides) for trial in made}) == 6
    text = refusal(tmp_path, f"  random: {{num: 100000, {space}}}")
    assert "sweep.yaml:9: `sweep.random` asks for 100000 arms, and its draws allow 6" in text
    assert "write num: 6, or widen the draws" in text


def test_a_sweep_of_seeds_alone_has_one_arm(tmp_path: Path) -> None:
    assert [trial.name for trial in trials(tmp_path, "  seeds: [1, 2]")] == ["base-seed1", "base-seed2"]


@pytest.mark.parametrize(
    "overrides",
    [
        {"adapter.targets": ["to_k", "../x"]},
        {"lr_scheduler": {"type": "phases", "phases": [{"type": "linear", "steps": "50%"}] * 9}},
        {"model.path": "/a/b c/ü"},
        {"optimizer.lr": 1e-7, "train.ema_decay": None, "data.flip": True},
    ],
)
def test_generated_names_are_safe_and_distinct(overrides: dict[str, object]) -> None:
    name = arm_name(overrides)
    assert is_path_safe(name)
    assert name != arm_name({**overrides, "optimizer.lr": 2e-7})


def test_every_mistake_is_told_with_its_line(tmp_path: Path) -> None:
    text = refusal(
        tmp_path,
        """
  trials:
    a: {optimizer.lrr: 1e-4}
    b: [train.max_steps]
    "../c": {}
    d: {output_dir: elsewhere}
    e: {optimizer.lr: -1}
    f: {validation.fraction: 0.3}
""",
    )
    assert "sweep.yaml:11: trial `a`: `optimizer.lrr` is not a setting" in text
    assert "did you mean `lr`?" in text
    assert "`train.max_steps` is no override" in text
    assert "`../c` becomes a folder's name" in text
    assert "trial `d` cannot override `output_dir`" in text
    assert "sweep.yaml:15: trial `e`: `optimizer.lr`" in text
    assert "trials are compared on one probe" in text


@pytest.mark.parametrize(
    ("sweep", "overrides", "said"),
    [
        ("  seeds: [1, 1]", (), "each seed once"),
        ("  trails: {}", (), "did you mean `trials`?"),
        ("  grid: {optimizer.lr: []}", (), "sweep.grid.optimizer.lr"),
        ("  random: {num: 2, optimizer.lr: {normal: [0, 1]}}", (), "one of log_uniform, uniform and choice"),
        ("  random: {num: 2, optimizer.lr: {log_uniform: [1, 0]}}", (), "the smaller one first"),
        ("  trials: {a: {optimizer.lr: 1e-4}, b: [optimizer.lr=1e-4]}", (), "`a` and `b` are the same trial"),
        ("  seeds: [1]", ("validation=null",), "add validation"),
    ],
)
def test_refusals(tmp_path: Path, sweep: str, overrides: tuple[str, ...], said: str) -> None:
    assert said in refusal(tmp_path, sweep, *overrides)


def test_the_null_of_a_key_that_is_gone_is_read_and_its_use_refused(tmp_path: Path) -> None:
    """An earlier version wrote every default into config.yaml."""
    text = "name: x\nmodel: {path: b}\ndata: {dir: d}\ntrain: {max_steps: 4}\nvalidation: {fraction: 0.1}\n"
    for behind, is_read in (("null", True), ("{at: 50%, keep: 2}", False)):
        file = tmp_path / "config.yaml"
        file.write_text(text + f"sweep: {{prune: {{behind: {behind}}}}}\n")
        if is_read:
            assert load_config(file).sweep is not None
        else:
            with pytest.raises(ConfigError, match="behind"):
                load_config(file)


def test_a_type_alone_names_its_arm() -> None:
    assert arm_name({"lr_scheduler": "cosine", "optimizer.lr": 1e-3}) == "cosine-lr1e-3"


def test_what_is_wrong_with_every_trial_is_told_once(tmp_path: Path) -> None:
    text = refusal(
        tmp_path,
        """
  seeds: [1, 2]
  grid: {optimizer.epss: [1, 2], optimizer.lr: [1e-3, 1e-4, 1e-5]}
""",
    )
    assert text.count("is not a setting") == 1
    assert "trial `epss1-lr1e-3`, trial `epss1-lr1e-4`" in text
    assert "1 more: `optimizer.epss` is not a setting" in text
