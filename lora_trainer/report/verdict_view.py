"""A verdict on the page: its sentence, the table of arms, the table of pairs, and the paired differences drawn."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from lora_trainer.evidence.statistics.arms import Arm
from lora_trainer.evidence.statistics.paired import paired_test
from lora_trainer.evidence.statistics.verdict import Outcome, Pair, Verdict, smallest_effect
from lora_trainer.report.figure import FAINT, INK, SERIES, Plot, Table, draw

MOST_PAIRS_DRAWN = 10
_PERCENT = 100


@dataclass(frozen=True, slots=True)
class VerdictView:
    """One question and its answer."""

    label: str
    sentence: str
    notes: tuple[str, ...]
    arms: Table
    pairs: Table | None
    plot: Plot | None


def verdict_view(verdict: Verdict, number: int) -> VerdictView:
    """Lay out one verdict; `number` keeps the ids of its plot apart."""
    tested = [pair for pair in verdict.pairs if pair.test is not None]
    fresh = "Confirmation on fresh seeds: " if verdict.purpose == "confirmation" else ""
    return VerdictView(
        fresh + verdict.question.label,
        verdict.sentence,
        verdict.question.notes,
        arms_table(verdict),
        pairs_table(verdict) if verdict.pairs else None,
        _difference_plot(verdict, tested, number) if tested else None,
    )


def arms_table(verdict: Verdict) -> Table:
    """The arms by rank: LR, budget, loss, gain over the base with its interval over seeds."""
    rows = tuple(
        (
            arm.name,
            f"{arm.peak_lr:.3g}",
            f"{arm.lr_budget:.2f}",
            str(len(arm.losses)),
            "–" if not arm.losses else f"{np.mean(list(arm.losses.values())):.4f}",
            _gain(arm, verdict.rules.level),
            _place(arm, verdict),
        )
        for arm in verdict.arms
    )
    header = ("trial", "peak LR", "LR budget", "seeds", "held-out loss", "gain over base", "place")
    return Table(f"Trials by held-out loss at the end, relative to the base ({verdict.question.label})", header, rows)


def _gain(arm: Arm, level: float) -> str:
    """Mean gain in percent of the base's loss, and its t interval over seeds."""
    if not arm.losses:
        return "–"
    gains = [_PERCENT * (1 - loss) for loss in arm.losses.values()]
    if len(gains) == 1:
        return f"{gains[0]:z.2f} %"
    low, high = paired_test(gains).interval(level)
    return f"{np.mean(gains):z.2f} % ({low:z.2f} to {high:z.2f})"


def _place(arm: Arm, verdict: Verdict) -> str:
    if arm.failed:
        return f"failed on seed {', '.join(map(str, sorted(arm.failed)))}"
    if verdict.choice is None:
        return Outcome.NOT_TESTED
    if arm in verdict.unbeaten:
        return "unbeaten" if len(verdict.unbeaten) == 1 else "tied"
    winners = [pair.better.name for pair in verdict.pairs if pair.worse is arm and pair.outcome == Outcome.BETTER]
    return f"beaten by {len(winners)}" if winners else str(Outcome.NOT_TESTED)


def pairs_table(verdict: Verdict) -> Table:
    """Every pair: the difference in percent of the base's loss, intervals, adjusted p, sign share, what it shows."""
    rows = []
    for pair in verdict.pairs:
        name = f"{pair.better.name} − {pair.worse.name}"
        if pair.test is None or pair.interval is None or pair.adjusted_interval is None:
            rows.append((name, "–", "–", "–", "–", "–", f"{pair.outcome}: {pair.why}"))
            continue
        rows.append(
            (
                name,
                f"{-_PERCENT * pair.test.mean:z.3f} %",
                _interval(pair.interval),
                _interval(pair.adjusted_interval),
                f"{pair.adjusted_p:.3g}",
                f"{pair.same_sign:.0%}",
                str(pair.outcome) if pair.outcome == Outcome.BETTER else f"{pair.outcome}: {pair.why}",
            )
        )
    header = ("pair", "difference of loss", "95 % interval", "adjusted interval", "adjusted p", "same sign", "shows")
    return Table("Paired differences of the held-out loss, in percent of the base's loss", header, tuple(rows))


def _interval(bounds: tuple[float, float]) -> str:
    """Of worse minus better, told as better minus worse: negative is a smaller loss."""
    low, high = sorted(-_PERCENT * bound for bound in bounds)
    return f"{low:z.3f} to {high:z.3f}"


def _difference_plot(verdict: Verdict, tested: Sequence[Pair], number: int) -> Plot:
    """A row per pair: dots are seeds, the thick bar the pair's own interval, the thin one the adjusted interval."""
    drawn = list(tested)
    if len(drawn) > MOST_PAIRS_DRAWN:
        leader = verdict.arms[0].name
        drawn = [pair for pair in tested if leader in (pair.better.name, pair.worse.name)]
    shown = sum(pair.outcome == Outcome.BETTER for pair in drawn)
    all_pairs = "" if len(drawn) == len(tested) else f" with {verdict.arms[0].name}, the smallest mean"
    summary = (
        f"Paired differences of held-out loss for {len(drawn)} pairs{all_pairs}. In {shown} of them the adjusted "
        "interval, the smallest effect and the seeds agree on a difference. The table of pairs has the numbers."
    )

    def paint(axes: Axes) -> None:
        for row, pair in enumerate(drawn):
            _paint_pair(axes, row, pair, smallest_effect(pair, verdict.rules))
        axes.axvline(0, color=INK, linewidth=0.8)
        labels = [_label(pair) for pair in drawn]
        axes.set_yticks(range(len(drawn)), labels, fontsize=8)
        axes.set(ylim=(len(drawn) - 0.4, -0.6), xlabel="difference of loss, % of the base's loss")
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")

    svg = draw(f"pairs-{number}", summary, paint, height_in=0.9 + 0.42 * len(drawn), long_labels=True)
    return Plot(f"Paired differences ({verdict.question.label})", summary, svg, _by_seed(drawn))


def _paint_pair(axes: Axes, row: int, pair: Pair, least: float) -> None:
    assert pair.test is not None and pair.interval is not None and pair.adjusted_interval is not None
    colour = SERIES[0] if pair.outcome == Outcome.BETTER else SERIES[NO_DIFFERENCE_COLOUR]
    span = _PERCENT * least
    axes.fill_betweenx([row - 0.4, row + 0.4], -span, span, color=FAINT, alpha=0.6, linewidth=0)
    for bounds, width in ((pair.adjusted_interval, 1.0), (pair.interval, 4.0)):
        axes.plot([-_PERCENT * bound for bound in bounds], [row, row], color=colour, linewidth=width)
    seeds = [-_PERCENT * value for value in pair.differences]
    axes.plot(seeds, [row - 0.22] * len(seeds), color=INK, marker="o", ms=2.5, linestyle="none")
    axes.plot([-_PERCENT * pair.test.mean], [row], color=colour, marker="D", ms=5, linestyle="none")


NO_DIFFERENCE_COLOUR = 6


def _label(pair: Pair) -> str:
    return "\n".join(textwrap.wrap(f"{pair.better.name} − {pair.worse.name}", 26)[:2])


def _by_seed(pairs: Sequence[Pair]) -> Table:
    seeds = sorted({seed for pair in pairs for seed in pair.seeds})
    rows = []
    for pair in pairs:
        by_seed = dict(zip(pair.seeds, pair.differences, strict=True))
        values = (f"{-_PERCENT * by_seed[seed]:z.3f}" if seed in by_seed else "–" for seed in seeds)
        rows.append((f"{pair.better.name} − {pair.worse.name}", *values))
    header = ("pair", *(f"seed {seed}" for seed in seeds))
    return Table("Difference of loss by seed, in percent of the base's loss", header, tuple(rows))
