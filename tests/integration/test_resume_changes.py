"""What may change between a run and its resume, and what a longer run does to the LR curve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from test_resume import rows, stop_after

from lora_trainer.config.load import load_config
from lora_trainer.errors import ConfigError, StoppedBySignal
from lora_trainer.planning.run_plan import resolve_param_groups
from lora_trainer.schedules.schedule import Horizon
from lora_trainer.tracking.metrics import step_rows

Train = Callable[..., Path]
LONGER = ("train.max_steps=8", "resume.allow_changes=train.max_steps")


def stopped(train_toy: Train, monkeypatch: pytest.MonkeyPatch, step: int, *overrides: str) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(StoppedBySignal):
            train_toy(*overrides)


def curve(config: Path, length: int, *overrides: str) -> list[float]:
    """The LRs of a run of `length` updates, by the schedule alone."""
    (group,) = resolve_param_groups(load_config(config, overrides), Horizon(length, 3), "unet")
    return [group.lr(k) for k in range(length)]


def test_a_constant_run_made_longer_equals_the_long_run(train_toy: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    constant = "lr_scheduler={type: constant_with_warmup, warmup_steps: 2}"
    straight = train_toy(constant, "train.max_steps=8")
    straight = straight.rename(straight.with_name("straight"))
    stopped(train_toy, monkeypatch, 4, constant)
    longer = train_toy(constant, *LONGER)
    assert (longer / "toy.safetensors").read_bytes() == (straight / "toy.safetensors").read_bytes()
    assert rows(longer) == rows(straight)


def test_stretch_lays_the_curve_over_the_new_length(
    train_toy: Train, monkeypatch: pytest.MonkeyPatch, toy_config: Path
) -> None:
    stopped(train_toy, monkeypatch, 4)
    run_dir = train_toy(*LONGER, "resume.schedule=stretch")
    used = [row["lr"] for row in step_rows(run_dir / "metrics.jsonl")]
    assert used == curve(toy_config, 6)[:4] + curve(toy_config, 8)[4:]


def test_keep_holds_the_last_value_over_several_resumes(
    train_toy: Train, monkeypatch: pytest.MonkeyPatch, toy_config: Path
) -> None:
    linear = "lr_scheduler={type: inverse_sqrt, warmup_steps: 2}"
    train_toy(linear)
    stopped(train_toy, monkeypatch, 1, linear, *LONGER)
    run_dir = train_toy(linear, "train.max_steps=8")  # accepted once, it need not be said again
    used = [row["lr"] for row in step_rows(run_dir / "metrics.jsonl")]
    (group,) = resolve_param_groups(load_config(toy_config, [linear]), Horizon(6, 3), "unet")
    assert used == [*curve(toy_config, 6, linear), group.lr(6), group.lr(6)]


def test_a_kept_curve_that_ended_at_zero_is_refused_with_the_fix(train_toy: Train) -> None:
    train_toy()
    with pytest.raises(ConfigError, match="2 more would learn nothing") as caught:
        train_toy(*LONGER)
    assert "resume.schedule: stretch" in str(caught.value)


def test_an_allowed_setting_takes_effect_and_the_others_still_stop(
    train_toy: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(train_toy, monkeypatch, 3)
    allowed = "resume.allow_changes=[optimizer.lr, optimizer.weight_decay]"
    with pytest.raises(ConfigError, match="seed: 42 -> 1") as caught:
        train_toy("optimizer.lr=2e-3", "seed=1", allowed)
    assert "resume.allow_changes=[seed]" in str(caught.value)
    assert "optimizer.lr" not in str(caught.value)
    run_dir = train_toy("optimizer.lr=2e-3", "optimizer.weight_decay=0.5", allowed)
    used = [row["lr"] for row in step_rows(run_dir / "metrics.jsonl")]
    assert used[2:4] == pytest.approx([1e-3, 2e-3 * 0.8535533906])


def test_a_changed_option_of_the_optimizer_is_not_overruled_by_the_checkpoint(
    train_toy: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    decay, allowed = "optimizer.weight_decay=100", "resume.allow_changes=optimizer.weight_decay"
    stopped(train_toy, monkeypatch, 3)
    changed = train_toy(decay, allowed)
    changed = changed.rename(changed.with_name("changed"))
    stopped(train_toy, monkeypatch, 3)
    unchanged = train_toy()
    assert (changed / "toy.safetensors").read_bytes() != (unchanged / "toy.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        ("adapter.rank", "`adapter.rank` cannot change in a run"),
        ("optimizer", "`optimizer` cannot change in a run"),
        ("optimizer.lrr", "did you mean `optimizer.lr`"),
    ],
)
def test_what_cannot_be_allowed_is_refused(train_toy: Train, allowed: str, message: str) -> None:
    train_toy()
    with pytest.raises(ConfigError, match=message):
        train_toy(f"resume.allow_changes={allowed}")


def test_stretch_without_a_change_of_length_is_refused(toy_config: Path) -> None:
    with pytest.raises(ConfigError, match="has no effect"):
        load_config(toy_config, ["resume.schedule=stretch"])


def test_a_run_may_go_on_in_fp16_under_a_scale_that_is_settled_there(
    train_toy: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(train_toy, monkeypatch, 3)
    run_dir = train_toy("train.precision=fp16", "resume.allow_changes=train.precision")
    assert [row["step"] for row in step_rows(run_dir / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_what_shapes_the_state_is_not_offered_as_a_change(train_toy: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(train_toy, monkeypatch, 3)
    with pytest.raises(ConfigError, match=r"optimizer\.type") as refused:
        train_toy("optimizer={type: lion, lr: 1e-3}")
    assert "allow_changes" not in str(refused.value)
