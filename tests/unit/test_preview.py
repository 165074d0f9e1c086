"""The schedules seen before training: in words, as a picture, without torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from lora_trainer.cli.plan import prepare_plan, show_preset
from lora_trainer.cli.program import main
from lora_trainer.cli.schedules import (
    example_horizon,
    explain,
    fact_rows,
    list_schedules,
    plot,
    previews,
    show_options,
)
from lora_trainer.config.learning_rates import PRESETS
from lora_trainer.config.load import check_source, load_config
from lora_trainer.config.source import Source
from lora_trainer.errors import ConfigError, SystemSetupError
from lora_trainer.report.pictures import Curve, draw_schedules, terminal_plot
from lora_trainer.schedules.registry import CLASSIC, SCHEDULES, allow_plugins
from lora_trainer.schedules.schedule import Mark


def test_every_schedule_is_listed_shown_and_explained() -> None:
    assert [name for name, _ in list_schedules()][: len(SCHEDULES)] == list(SCHEDULES)
    for name in SCHEDULES:
        assert dict(show_options(name)) or name == "constant"
        said = dict(explain([name], example_horizon(1000, None), 1e-4))
        assert said["purpose"]
        assert said["limits"]
        assert "LR budget" in said


def test_explain_gives_budget_half_life_and_shrink() -> None:
    said = dict(explain(["linear"], example_horizon(1000, None), 1e-4))
    assert said["LR budget"].startswith("0.50")
    assert said["half-life"] == "500 updates after the peak"
    assert "0.05%" in said["weight decay"]


def test_the_default_preview_is_the_classic_six_over_one_run() -> None:
    shown = previews([], None, 500, 2e-4)
    assert [each.label for each in shown] == list(CLASSIC)
    assert {len(each.facts.lrs) for each in shown} == {500}
    assert {each.facts.peak for each in shown} == {2e-4}


def test_options_go_to_those_that_have_them() -> None:
    shown = {each.label: each for each in previews(["linear", "constant", "warmup_steps=10%"], None, 100, None)}
    assert shown["linear"].schedule.warmup.num_steps == 10
    assert shown["constant"].schedule.warmup.num_steps == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cosin"], "did you mean cosine"),
        (["linear", "power=2"], "choose a type that has it: polynomial"),
        (["constant", "warmup_steps=10"], "choose a type that has it: constant_with_warmup"),
        (["linear", "rex", "powr=2"], "`lr_scheduler.powr` is not a setting"),
        (["linear", "warmup_steps=5 percent"], "a length is"),
        (["linear", "warmup_steps=0.05"], '0.05 of the run is "5%"'),
        (["linear", "warmup_steps=100%"], "does not fit"),
        (["linear", "min_ratio=[1"], "not valid YAML"),
        (["step", "step_size=0.3", "gamma=2"], r"step_size.*(\n.*)+gamma"),
    ],
)
def test_what_cannot_be_previewed(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        previews(words, None, 100, None)


def test_an_example_gives_way_to_what_is_written() -> None:
    (fast,) = previews(["exponential", "unit=step", "gamma=0.99"], None, 1000, 5e-5)
    assert fast.facts.half_life == 69
    (straight,) = previews(["polynomial", "lr_end=0", "power=1"], None, 100, 1e-4)
    assert straight.facts.lrs == previews(["linear"], None, 100, 1e-4)[0].facts.lrs
    (example,) = previews(["polynomial"], None, 100, 1e-4)
    assert dict(fact_rows(example))["options"] == "power 2.0"
    (with_warmup,) = previews(["multistep", "warmup_steps=10"], None, 100, 1e-4)
    assert [mark.update for mark in with_warmup.schedule.marks] == [10, 50, 80]


def two_steps(num_updates: int, updates_per_epoch: int, low: float = 0.5) -> Callable[[int], float]:
    return lambda k: 1.0 if k < updates_per_epoch else low


@pytest.fixture
def plugins() -> Iterator[None]:
    allow_plugins(True)
    yield
    allow_plugins(False)


@pytest.mark.usefixtures("plugins")
def test_a_function_by_dotted_path_is_previewed_like_any_other() -> None:
    (shown,) = previews([f"{__name__}:two_steps", "args={low: 0.25}"], None, 8, 1.0, steps_per_epoch=3)
    assert shown.facts.lrs == (1.0,) * 3 + (0.25,) * 5
    assert "purpose" in dict(explain([f"{__name__}:two_steps"], example_horizon(10, None), 1e-4))


def test_an_installed_package_adds_a_schedule_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "sawtooth-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: sawtooth\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[lora_trainer.lr_schedules]\nsawtooth = sawtooth_schedule:build\n")
    (tmp_path / "sawtooth_schedule.py").write_text(
        "def build(num_updates, updates_per_epoch, low=0.0):\n"
        "    return lambda k: 1 - (1 - low) * (k % updates_per_epoch) / updates_per_epoch\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "sawtooth" in dict(list_schedules())
    (shown,) = previews(["sawtooth", "args={low: 0.5}"], None, 8, 1.0, steps_per_epoch=4)
    assert shown.facts.lrs == (1.0, 0.875, 0.75, 0.625) * 2
    assert dict(show_options("sawtooth"))["args"]
    with pytest.raises(ConfigError, match="no_such_name"):
        previews(["no_such_name"], None, 8, 1.0)


def test_the_epochs_of_a_preview_can_be_said() -> None:
    (shown,) = previews(["exponential", "gamma=0.5"], None, 100, 1.0, steps_per_epoch=25)
    assert [shown.facts.lrs[k] for k in (0, 24, 25, 50, 99)] == pytest.approx([1, 1, 0.5, 0.25, 0.125])


def test_the_words_beside_a_config_are_its_overrides(toy_config: Path) -> None:
    (shown,) = previews(
        ["train.max_steps=40", "lr_scheduler={type: linear}", "optimizer.lr=2e-3"], toy_config, None, None
    )
    assert shown.facts.lrs == previews(["linear"], None, 40, 2e-3)[0].facts.lrs
    (named,) = previews(["linear"], toy_config, None, None)
    assert (len(named.facts.lrs), named.facts.peak) == (6, 1e-3)
    (longer,) = previews([], toy_config, 50, 5e-4)
    assert (len(longer.facts.lrs), longer.facts.peak) == (50, 5e-4)


def test_a_preview_is_what_the_plan_of_the_run_says(toy_config: Path) -> None:
    overrides = [
        "lr_scheduler={type: cosine, warmup_steps: 2}",
        "optimizer.groups=[{name: up, match: [lora_B.weight], lr: 5e-4}]",
    ]
    (first, up) = previews(overrides, toy_config, None, None)
    groups = prepare_plan(load_config(toy_config, overrides)).plan.param_groups
    assert [g.lr_peak for g in groups] == [first.facts.peak, up.facts.peak] == [1e-3, 5e-4]
    assert [g.lr_end for g in groups] == [first.facts.lrs[-1], up.facts.lrs[-1]]
    assert [g.lr_budget for g in groups] == [first.facts.budget, up.facts.budget]
    assert up.label == "up: cosine"


def test_a_picture_that_cannot_be_written_is_a_plain_refusal(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"end its name in \.png"):
        plot(["linear"], None, 10, None, every=False, output=tmp_path / "x.jpg", terminal=False)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemSetupError, match="cannot be written"):
        plot(["linear"], None, 10, None, every=False, output=tmp_path / "folder.png", terminal=False)


@pytest.mark.parametrize("lr", ["0", "-1e-4", "nan", "inf"])
def test_a_learning_rate_is_above_zero(lr: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["schedules", "plot", "linear", "--lr", lr])
    assert caught.value.code == 2
    assert "a learning rate is above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "marks"),
    [
        (["linear", "warmup_steps=10%", "cooldown_steps=20%"], [(10, "End of warmup"), (80, "Start of cooldown")]),
        (["cosine_with_restarts", "num_cycles=4"], [(25, "Restart"), (50, "Restart"), (75, "Restart")]),
        (["cosine_warm_restarts", "t_0=20", "t_mult=2"], [(20, "Restart"), (60, "Restart")]),
        (["cosine_annealing", "t_max=30"], [(30, "LR rises again"), (90, "LR rises again")]),
        (["step", "step_size=40"], [(40, "Milestone at step 40"), (80, "Milestone at step 80")]),
        (["multistep", "milestones=[50]"], [(50, "Milestone at step 50")]),
        (["warmup_stable_decay"], [(80, "Start of decay")]),
        (["one_cycle"], [(29, "Peak")]),
    ],
)
def test_a_plot_marks_what_happens(words: list[str], marks: list[tuple[int, str]]) -> None:
    (shown,) = previews(words, None, 100, None)
    assert [(mark.update, mark.label) for mark in shown.schedule.marks] == marks
    told = [row for row in fact_rows(shown) if row[0].startswith("at ")]
    assert told == [(f"at {update}", label) for update, label in marks]


def test_marks_lie_where_the_curve_turns() -> None:
    lrs = {name: previews([name], None, 200, 1.0)[0] for name in ("one_cycle", "cosine_with_restarts", "step")}
    peak = lrs["one_cycle"].facts.lrs
    assert peak.index(max(peak)) == lrs["one_cycle"].schedule.marks[0].update
    for name in ("cosine_with_restarts", "step"):
        values = lrs[name].facts.lrs
        jumps = [k for k in range(1, 200) if abs(values[k] - values[k - 1]) > 0.1]
        assert jumps == [mark.update for mark in lrs[name].schedule.marks]


def test_a_picture_of_five_thousand_steps_with_each_label_once(tmp_path: Path) -> None:
    marks = [Mark(500, "End of warmup"), Mark(1000, "Restart"), Mark(2000, "Restart")]
    curves = [Curve("one", [1e-4] * 5000, marks), Curve("two", [5e-5] * 5000, marks)]
    draw_schedules(curves, tmp_path / "two.png", title="x", steps_per_epoch=100)
    with Image.open(tmp_path / "two.png") as picture:
        assert picture.size == (1200, 600)
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 50
    draw_schedules(curves * 6, tmp_path / "many.png", title="x")
    assert (tmp_path / "many.png").stat().st_size > 10_000


def test_legends_name_each_kind_of_mark_once() -> None:
    from matplotlib.figure import Figure

    from lora_trainer.report.pictures import _draw_panel

    axes = Figure().subplots()
    marks = [Mark(5, "End of warmup"), *(Mark(k, "Restart") for k in (10, 20, 30))]
    _draw_panel(axes, [Curve("one", [1.0] * 40, marks), Curve("two", [0.5] * 40, marks)], "x")
    legend = axes.get_legend()
    assert legend is not None
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["one", "two", "End of warmup", "Restart"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Steps", "Learning Rate")


def test_many_milestones_share_one_entry_of_the_legend() -> None:
    from matplotlib.figure import Figure

    from lora_trainer.report.pictures import _draw_panel

    axes = Figure().subplots()
    _draw_panel(axes, [Curve("one", [1.0] * 40, [Mark(k, f"Milestone at step {k}") for k in range(4, 40, 4)])], "x")
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["one", "9 milestones"]
    assert all(line.get_linestyle() == "--" and line.get_color() == "red" for line in axes.get_lines()[1:])


def test_the_figure_of_the_six_has_six_curves_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_trainer.report import pictures

    drawn = []
    honest = pictures._draw_panel
    monkeypatch.setattr(pictures, "_draw_panel", lambda axes, *rest: (honest(axes, *rest), drawn.append(axes)))
    plot([], None, 200, None, 20, every=False, output=tmp_path / "six.png", terminal=False)
    (axes,) = drawn
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()][:6] == list(CLASSIC)
    assert axes.child_axes[0].get_xlabel() == "Epochs"
    for name, line in zip(CLASSIC, axes.get_lines(), strict=False):
        assert list(line.get_ydata()) == list(previews([name], None, 200, None, 20)[0].facts.lrs)


def test_the_terminal_shows_the_curve() -> None:
    drawn = terminal_plot([Curve("linear", [1 - k / 100 for k in range(100)])], title="LR", width=80)
    assert "Steps" in drawn
    assert len(drawn.splitlines()) >= 20


@pytest.mark.process
def test_previews_never_load_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from lora_trainer.cli.program import main\n"
        f"for words in (['plot', '--all', '--terminal', '-o', {str(tmp_path / 'x.png')!r}], ['explain', 'rex']):\n"
        "    try: main(['schedules', *words])\n"
        "    except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").is_file()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_config(name: str) -> None:
    from lora_trainer.config.source import set_value, split_override

    base = {"name": "x", "model": {"path": "b"}, "data": {"dir": "d"}, "train": {"max_steps": 100}}
    source = Source(base)
    for word in PRESETS[name].overrides():
        set_value(source, *split_override(word, None), None)
    check_source(source)
    assert PRESETS[name].purpose in show_preset(name)


def test_the_recommended_learning_rates() -> None:
    rates = {name: PRESETS[name].settings["optimizer.lr"] for name in ("lora", "general", "conservative", "full")}
    assert rates == {"lora": 1e-4, "general": 5e-5, "conservative": 4e-5, "full": 5e-6}


def test_the_bert_preset_warms_up_over_epochs_and_falls_straight() -> None:
    (setting,) = PRESETS["bert"].settings.values()
    (shown,) = previews(["linear", f"warmup_steps={setting['warmup_steps']}"], None, 60, 1.0, steps_per_epoch=20)
    assert setting["type"] == "linear"
    assert shown.schedule.marks == (Mark(20, "End of warmup"),)
    assert [shown.facts.lrs[k] for k in (0, 10, 20, 40)] == pytest.approx([0, 0.5, 1, 0.5])
