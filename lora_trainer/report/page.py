"""report.html: one self-contained page about a run, or about several compared. From the run directories alone."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lora_trainer import __version__
from lora_trainer.evidence.statistics.arms import confirming, questions
from lora_trainer.evidence.statistics.compare import Rules
from lora_trainer.evidence.statistics.ties import ROUNDING
from lora_trainer.evidence.statistics.wording import judge
from lora_trainer.report.comparison import ArmRuns, arms, check_fresh, hindrances, pairing_notes, varied
from lora_trainer.report.diagnosis_table import NOT_MEASURED, diagnosis_table
from lora_trainer.report.figure import Plot, Table
from lora_trainer.report.item_table import item_table
from lora_trainer.report.line_plot import swatch
from lora_trainer.report.run_plots import band_plot, curve_plots
from lora_trainer.report.run_record import RunRecord, not_begun, read_runs
from lora_trainer.report.sample_table import SampleTable, sample_table
from lora_trainer.report.verdict_view import VerdictView, verdict_view
from lora_trainer.storage import atomic_files
from lora_trainer.tracking.metrics import damage_note, probe_fault

TEMPLATES = Path(__file__).parent / "templates"
GENERATOR = "lora_trainer report"
"""Said in the page's head, so that a page of ours can be told from another file."""
_PATH = re.compile(r"(?<![\w:/.…])~?(?:/[^\s/'\"`:,;()]+)+/(?=[^\s/])")


@dataclass(frozen=True, slots=True)
class Page:
    """Everything that stands on the page, in its order."""

    title: str
    headline: str
    notes: tuple[str, ...]
    legend: tuple[tuple[Markup, str], ...]
    verdicts: tuple[VerdictView, ...]
    runs: Table
    items: Table | None
    curves: tuple[Plot, ...]
    bands: Plot | None
    samples: SampleTable | None
    diagnosis: Table | None
    differences: Table | None
    settings: tuple[Table, ...]
    cost: Table
    environment: Table
    commands: tuple[str, ...]
    version: str = __version__


def write_report(
    folders: Sequence[Path],
    output: Path,
    *,
    confirm: Sequence[Path] = (),
    title: str | None = None,
    rules: Rules | None = None,
) -> str:
    """Write the page of these run directories and sweeps; the sentence at its head.

    Args:
        confirm: run directories and sweeps of settings that were chosen among `folders`, on fresh seeds.

    Raises:
        ConfigError: a folder is no run directory, two runs have equal settings and seed, or a confirming seed is not
            fresh.
    """
    records = [*read_runs(folders), *read_runs(confirm, "confirmation")]
    page = build_page(records, title, rules or Rules(), not_begun([*folders, *confirm]))
    atomic_files.write_file(output, render(page).encode())
    return page.headline


def build_page(records: Sequence[RunRecord], title: str | None, rules: Rules, notes: Sequence[str] = ()) -> Page:
    """Lay out the page of some runs, with further notes at its head."""
    check_fresh(records)
    sources = list(dict.fromkeys(record.source for record in records if record.purpose == "selection"))
    groups, against = arms(records), hindrances(records)
    verdicts = verdict_views(groups, rules) if len(groups) > 1 and not against else []
    started = [group for group in groups if group.runs[0].updates]
    return Page(
        title=title or (f"{len(records)} runs compared" if len(sources) > 1 else sources[0]),
        headline=headline(records, groups, verdicts, against),
        notes=(*pairing_notes(groups), *waiting_notes(records), *damage_notes(groups), *notes),
        legend=tuple((swatch(group.place), group.name) for group in groups) if len(groups) > 1 else (),
        verdicts=tuple(verdicts),
        runs=runs_table(groups),
        items=item_table(groups) if len(groups) > 1 and not against else None,
        curves=tuple(curve_plots(started)) if started else (),
        bands=band_plot(groups),
        samples=sample_table(groups),
        diagnosis=diagnosis_table(groups),
        differences=differences_table(records, groups),
        settings=tuple(settings_table(group.runs[0], group.name) for group in groups),
        cost=cost_table(groups),
        environment=environment_table(records),
        commands=commands(records),
    )


def render(page: Page) -> str:
    """The page as HTML, everything escaped that is not drawn by us."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Markup((TEMPLATES / "style.css").read_text())  # noqa: S704 - our own file
    return environment.get_template("report.html").render(
        page=page, style=style, generator=GENERATOR, not_measured=NOT_MEASURED
    )


def verdict_views(groups: Sequence[ArmRuns], rules: Rules) -> list[VerdictView]:
    """The answer to every question that these arms allow; what fresh seeds say comes first."""
    confirmed = [arm for group in groups if (arm := group.as_arm("confirmation")) is not None]
    selected = [arm for group in groups if (arm := group.as_arm("selection")) is not None]
    verdicts = [judge(confirming(confirmed), rules, "confirmation")] if len(confirmed) > 1 else []
    verdicts += [judge(question, rules) for question in questions(selected)] if len(selected) > 1 else []
    return [verdict_view(verdict, number) for number, verdict in enumerate(verdicts, start=1)]


def waiting_notes(records: Sequence[RunRecord]) -> list[str]:
    """Runs that have no loss at their end: those that go on, and those that a sweep stopped."""
    goes_on = [run.name for run in records if not run.is_finished and run.failure is None]
    stopped = [run.name for run in records if run.ending is not None and run.ending["event"] == "stopped"]
    told = {"unfinished, not in any verdict": goes_on, "stopped early, which counts as failed": stopped}
    return [f"{what}: {', '.join(names)}" for what, names in told.items() if names]


def damage_notes(groups: Sequence[ArmRuns]) -> list[str]:
    """Logs that have damaged lines."""
    runs = [(group.name_of(run), run) for group in groups for run in group.runs]
    return [damage_note(f"metrics.jsonl of {name}", run.num_damaged) for name, run in runs if run.num_damaged]


def headline(
    records: Sequence[RunRecord], groups: Sequence[ArmRuns], verdicts: Sequence[VerdictView], against: Sequence[str]
) -> str:
    """The one sentence that the evidence allows."""
    if len(groups) > 1:
        return verdicts[0].sentence if verdicts else f"Not compared: {'; '.join(against)}."
    if len(records) > 1:
        return f"One setting on {len(records)} seeds: nothing was compared."
    run = records[0]
    if run.failure is not None:
        return f"The run {without_paths(run.status)}."
    last = run.final
    if last is None:
        return f"{run.step} of {run.num_updates} updates are done; the held-out loss at the end was {NOT_MEASURED}."
    best = run.best
    fell = best is not None and last["relative"] - best["relative"] > ROUNDING
    earlier = f", and was smallest at step {best['step']} ({best['relative']:.4f})" if best and fell else ""
    return (
        f"After {run.step} updates the held-out loss is {last['relative']:.4f} of the base's{earlier}; the standard "
        f"error of {last['se']:.4f} is this run's precision over its {len(last['items'])} images and says nothing "
        "about another seed."
    )


def runs_table(groups: Sequence[ArmRuns]) -> Table:
    """A row per run: where it stands, and its probes."""
    header = (
        "run",
        "seed",
        "status",
        "held-out loss",
        "± over images",
        "smallest",
        "at step",
        "gap to training images",
    )
    rows = tuple(_run_row(group, run) for group in groups for run in group.runs)
    return Table("Runs; losses relative to the base's, at the end of the run", header, rows)


def _run_row(group: ArmRuns, run: RunRecord) -> tuple[str, ...]:
    start = (group.name_of(run), str(run.seed), without_paths(run.status))
    last, best = run.final, run.best
    if last is None or best is None or run.failure is not None:
        return (*start, *[NOT_MEASURED] * 5)
    trained = run.probe("train")
    known = trained and probe_fault(trained[-1]) is None
    gap = f"{last['relative'] - trained[-1]['relative']:+z.4f}" if known else NOT_MEASURED
    return (*start, f"{last['relative']:.4f}", f"{last['se']:.4f}", f"{best['relative']:.4f}", str(best["step"]), gap)


def differences_table(records: Sequence[RunRecord], groups: Sequence[ArmRuns]) -> Table | None:
    """The settings that differ between trials; None where there is one trial."""
    keys = varied(records)
    if len(groups) < 2 or not keys:
        return None
    rows = tuple(
        (key, *(_shown(group.runs[0].identity[key]) if key in group.runs[0].identity else "–" for group in groups))
        for key in keys
    )
    return Table("Settings that differ", ("setting", *(group.name for group in groups)), rows)


def settings_table(run: RunRecord, name: str) -> Table:
    """Every setting and content that decides what is learned."""
    rows = tuple((key, _shown(value)) for key, value in sorted(run.identity.items()))
    return Table(f"Settings of {name}", ("setting", "value"), rows)


def cost_table(groups: Sequence[ArmRuns]) -> Table:
    """Time in updates and memory of every run."""
    rows = []
    for group in groups:
        for run in group.runs:
            memory = NOT_MEASURED if run.peak_memory_gib is None else f"{run.peak_memory_gib:.2f} GiB"
            speed = (
                f"{len(run.updates) * run.plan['global_batch'] / run.training_s:.2f}"
                if run.training_s
                else NOT_MEASURED
            )
            rows.append((group.name_of(run), str(run.step), f"{run.training_s:.0f} s", speed, memory))
    header = ("run", "updates", "time in updates", "images/s", "peak memory")
    return Table("Time and memory; probes, samples and saves are not in the time", header, tuple(rows))


def environment_table(records: Sequence[RunRecord]) -> Table:
    """Versions and hardware, of the first run; where another's differ, that is said."""
    first = records[0].environment
    plain = {key: value for key, value in first.items() if not isinstance(value, dict)} | first.get("packages", {})
    rows = [(key, _shown(value)) for key, value in plain.items()]
    if any(record.environment != first for record in records):
        rows.append(("other runs", "not all in this environment"))
    return Table("Environment", ("what", "value"), tuple(rows or [("environment", NOT_MEASURED)]))


def commands(records: Sequence[RunRecord]) -> tuple[str, ...]:
    """What to type to have the runs and this page again; run directories by their names."""
    sources = {record.source: record for record in records}
    trained = [
        f"lora-trainer {'train' if record.arm is None else 'sweep'} --config {name}/config.yaml"
        for name, record in sources.items()
    ]
    chosen = [name for name, record in sources.items() if record.purpose == "selection"]
    fresh = [f"--confirm {name}" for name, record in sources.items() if record.purpose == "confirmation"]
    return (*trained, f"lora-trainer report {' '.join([*chosen, *fresh])}")


def without_paths(text: str) -> str:
    """The text with the folders of absolute paths left out: they tell of a machine and its user."""
    return _PATH.sub("…/", text)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return without_paths(value if isinstance(value, str) else json.dumps(value))
