"""report.html: one self-contained page about a run, or about several compared. From the run directories alone."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lora_trainer import __version__
from lora_trainer.evidence.statistics.paired import ROUNDING
from lora_trainer.evidence.statistics.verdict import Rules, Verdict, confirming, judge, questions
from lora_trainer.report import runs, tables
from lora_trainer.report.plots import band_plot, curve_plots, difference_plot
from lora_trainer.report.runs import ArmRuns, RunRecord, named_runs, not_begun, read_runs
from lora_trainer.report.tables import NOT_MEASURED, without_paths
from lora_trainer.storage import atomic_files
from lora_trainer.tracking.metrics import damage_note

TEMPLATES = Path(__file__).parent / "templates"
GENERATOR = "lora_trainer report"  # said in the page's head, so that a page of ours can be told from another file


def write_report(
    folders: Sequence[Path], output: Path, *, confirm: Sequence[Path] = (), rules: Rules | None = None
) -> str:
    """Write the page of these run directories and sweeps; the sentence at its head.

    Args:
        confirm: run directories and sweeps of settings that were chosen among `folders`, on fresh seeds.

    Raises:
        ConfigError: a folder is no run directory, two runs are equal, or a confirming seed is not fresh.
    """
    records = [*read_runs(folders), *read_runs(confirm, "confirmation")]
    page = build_page(records, rules or Rules(), not_begun([*folders, *confirm]))
    atomic_files.write_file(output, render(page).encode())
    return page.headline


def build_page(records: Sequence[RunRecord], rules: Rules, notes: Sequence[str] = ()) -> SimpleNamespace:
    """Everything that stands on the page of some runs, by its name in the template; with further notes at its head."""
    runs.check_fresh(records)
    sources = list(dict.fromkeys(record.source for record in records if record.purpose == "selection"))
    arms, against = runs.arms(records), runs.incompatibilities(records)
    is_compared = len(arms) > 1 and not against
    verdicts = _verdict_views(arms, rules) if is_compared else []
    if len(arms) == 1:
        headline = _headline_of_one(records)
    else:
        headline = verdicts[0].sentence if verdicts else f"Not compared: {'; '.join(against)}."
    started = [arm for arm in arms if arm.runs[0].updates]
    return SimpleNamespace(
        title=f"{len(records)} runs compared" if len(sources) > 1 else sources[0],
        headline=headline,
        notes=(*runs.pairing_notes(arms), *_run_notes(records, arms), *notes),
        legend=tuple(arms) if len(arms) > 1 else (),
        verdicts=tuple(verdicts),
        runs=tables.runs_table(arms),
        items=tables.item_table(arms) if is_compared else None,
        curves=tuple(curve_plots(started)) if started else (),
        bands=band_plot(arms),
        samples=tables.sample_table(arms),
        diagnosis=tables.diagnosis_table(arms),
        differences=tables.differences_table(records, arms),
        settings=tuple(tables.settings_table(arm.runs[0], arm.name) for arm in arms),
        cost=tables.cost_table(arms),
        environment=tables.environment_table(records),
        commands=_commands(records),
        version=__version__,
    )


def render(page: SimpleNamespace) -> str:
    """The page as HTML, everything escaped that is not drawn by us."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    style = Markup((TEMPLATES / "style.css").read_text())  # noqa: S704 - our own file
    template = environment.get_template("report.html")
    return template.render(page=page, style=style, generator=GENERATOR, not_measured=NOT_MEASURED)


def _verdict_views(arms: Sequence[ArmRuns], rules: Rules) -> list[SimpleNamespace]:
    """The answer to every question that these arms allow; what fresh seeds say comes first."""
    confirmed = [judged for arm in arms if (judged := arm.as_arm("confirmation")) is not None]
    selected = [judged for arm in arms if (judged := arm.as_arm("selection")) is not None]
    verdicts = [judge(confirming(confirmed), rules, "confirmation")] if len(confirmed) > 1 else []
    verdicts += [judge(question, rules) for question in questions(selected)] if len(selected) > 1 else []
    return [_view(verdict, number) for number, verdict in enumerate(verdicts, start=1)]


def _view(verdict: Verdict, number: int) -> SimpleNamespace:
    """One question and its answer."""
    fresh = "Confirmation on fresh seeds: " if verdict.purpose == "confirmation" else ""
    return SimpleNamespace(
        label=fresh + verdict.question.label,
        sentence=verdict.sentence,
        notes=verdict.question.notes,
        arms=tables.arms_table(verdict),
        pairs=tables.pairs_table(verdict) if verdict.pairs else None,
        plot=difference_plot(verdict, number),
    )


def _run_notes(records: Sequence[RunRecord], arms: Sequence[ArmRuns]) -> list[str]:
    """Runs that have no loss at their end, as they go on or a sweep stopped them; logs with damaged lines."""
    goes_on = [run.name for run in records if not run.is_finished and run.failure is None]
    stopped = [run.name for run in records if run.ending is not None and run.ending["event"] == "stopped"]
    endless = {"unfinished, not in any verdict": goes_on, "stopped early, which counts as failed": stopped}
    return [
        *(f"{what}: {', '.join(names)}" for what, names in endless.items() if names),
        *(damage_note(f"metrics.jsonl of {name}", r.num_damaged) for name, r in named_runs(arms) if r.num_damaged),
    ]


def _headline_of_one(records: Sequence[RunRecord]) -> str:
    """The one sentence that the runs of one setting allow."""
    if len(records) > 1:
        return f"One setting on {len(records)} seeds: nothing was compared."
    run, last, best = records[0], records[0].final, records[0].best
    if run.failure is not None:
        return f"The run {without_paths(run.status)}."
    if last is None:
        return f"{run.step} of {run.num_steps} updates are done; the held-out loss at the end was {NOT_MEASURED}."
    fell = best is not None and last["relative"] - best["relative"] > ROUNDING
    earlier = f", and was smallest at step {best['step']} ({best['relative']:.4f})" if best and fell else ""
    loss = f"After {run.step} updates the held-out loss is {last['relative']:.4f} of the base's{earlier}"
    precision = f"is this run's precision over its {len(last['items'])} images and says nothing about another seed"
    return f"{loss}; the standard error of {last['se']:.4f} {precision}."


def _commands(records: Sequence[RunRecord]) -> tuple[str, ...]:
    """What to type where the runs were started to have them and this page again; absolute places are not told."""
    places = {record.place: record for record in records}
    verbs = {place: "train" if record.arm is None else "sweep" for place, record in places.items()}
    trained = [f"lora-trainer {verb} --config {shlex.quote(f'{place}/config.yaml')}" for place, verb in verbs.items()]
    chosen = [shlex.quote(place) for place, record in places.items() if record.purpose == "selection"]
    fresh = [f"--confirm {shlex.quote(place)}" for place, run in places.items() if run.purpose == "confirmation"]
    return (*trained, f"lora-trainer report {' '.join([*chosen, *fresh])}")
