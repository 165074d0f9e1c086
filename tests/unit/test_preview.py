"""The schedules seen before training: in words, as a picture, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lora_trainer.commands.plan import show_preset
from lora_trainer.commands.schedules import explain, list_schedules, previews, show_options
from lora_trainer.config.load import check_source
from lora_trainer.config.presets import PRESETS
from lora_trainer.config.source import Source
from lora_trainer.errors import ConfigError
from lora_trainer.report.schedule_plot import Curve, draw_schedules, terminal_plot
from lora_trainer.schedules.registry import CLASSIC, SCHEDULES
from lora_trainer.schedules.schedule import Mark


def test_every_schedule_is_listed_shown_and_explained() -> None:
    assert [name for name, _ in list_schedules()][: len(SCHEDULES)] == list(SCHEDULES)
    for name in SCHEDULES:
        assert dict(show_options(name)) or name == "constant"
        said = dict(explain(name, 1000, 1e-4))
        assert said["purpose"]
        assert said["limits"]
        assert "LR budget" in said


def test_explain_gives_budget_half_life_and_shrink() -> None:
    said = dict(explain("linear", 1000, 1e-4))
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
    assert shown["linear"].schedule.warmup.num_updates == 10
    assert shown["constant"].schedule.warmup.num_updates == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cosin"], "did you mean cosine"),
        (["linear", "power=2"], "`power` is no option"),
        (["linear", "warmup_steps=5 percent"], "a length is"),
        (["linear", "warmup_steps=100%"], "does not fit"),
    ],
)
def test_what_cannot_be_previewed(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        previews(words, None, 100, None)


def test_a_picture_of_five_thousand_steps_with_each_label_once(tmp_path: Path) -> None:
    marks = [Mark(500, "End of warmup"), Mark(1000, "Restart"), Mark(2000, "Restart")]
    curves = [Curve("one", [1e-4] * 5000, marks), Curve("two", [5e-5] * 5000, marks)]
    draw_schedules(curves, tmp_path / "two.png", title="x", updates_per_epoch=100)
    with Image.open(tmp_path / "two.png") as picture:
        assert picture.size == (1200, 600)
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 50
    draw_schedules(curves * 6, tmp_path / "many.png", title="x")
    assert (tmp_path / "many.png").stat().st_size > 10_000


def test_legends_name_each_kind_of_mark_once() -> None:
    from matplotlib.figure import Figure

    from lora_trainer.report.schedule_plot import _draw_panel

    axes = Figure().subplots()
    marks = [Mark(5, "End of warmup"), *(Mark(k, "Restart") for k in (10, 20, 30))]
    _draw_panel(axes, [Curve("one", [1.0] * 40, marks), Curve("two", [0.5] * 40, marks)], "x")
    legend = axes.get_legend()
    assert legend is not None
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["one", "two", "End of warmup", "Restart"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Steps", "Learning Rate")


def test_the_terminal_shows_the_curve() -> None:
    drawn = terminal_plot([Curve("linear", [1 - k / 100 for k in range(100)])], title="LR", width=80)
    assert "Steps" in drawn
    assert len(drawn.splitlines()) >= 20


def test_previews_never_load_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from lora_trainer.cli import main\n"
        f"try: main(['schedules', 'plot', 'cosine', '--terminal', '-o', {str(tmp_path / 'x.png')!r}])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").is_file()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_config(name: str) -> None:
    from lora_trainer.config.source import _override

    base = {"name": "x", "model": {"path": "b"}, "data": {"dir": "d"}, "train": {"max_steps": 100}}
    source = Source(base)
    for word in PRESETS[name].overrides():
        assert _override(source, word) is None
    check_source(source)
    assert PRESETS[name].purpose in show_preset(name)


def test_the_recommended_learning_rates() -> None:
    rates = {name: PRESETS[name].settings["optimizer.lr"] for name in ("lora", "general", "conservative", "full")}
    assert rates == {"lora": 1e-4, "general": 5e-5, "conservative": 4e-5, "full": 5e-6}
