"""The tables of the page: runs, diagnosis, samples, settings and cost; arms, pairs of arms, single runs compared."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from lora_trainer.evidence.statistics.paired import paired, same_sign_share, smallest
from lora_trainer.evidence.statistics.verdict import Arm, Outcome, Pair, Verdict
from lora_trainer.report.pictures import spread, step_name
from lora_trainer.report.runs import ArmRuns, Row, RunRecord, named_runs, varied
from lora_trainer.tracking.metrics import TRAIN, probe_fault

NOT_MEASURED = "not measured"
PERCENT = 100
DIAGNOSED = ("diagnosis", "early_report")
"""Events of a diagnosis; the early report is written even where nothing is told."""
MOST_SAMPLED_STEPS = 6
THUMBNAIL_PX, AS_IT_IS_PX = 256, 128
_PATH = re.compile(r"(?<![\w:/.…])~?(?:/[^\s/'\"`:,;()]+)+/(?=[^\s/])")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a header; the first cell of a row heads it."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def without_paths(text: str) -> str:
    """The text with the folders of absolute paths left out: they tell of a machine and its user."""
    return _PATH.sub("…/", text)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return without_paths(value if isinstance(value, str) else json.dumps(value))


def runs_table(arms: Sequence[ArmRuns]) -> Table:
    """A row per run: where it stands, and its probes."""
    probes = ("held-out loss", "± over images", "smallest", "at step", "gap to training images")
    runs = named_runs(arms)
    rows = tuple((name, str(run.seed), without_paths(run.status), *_probe_cells(run)) for name, run in runs)
    caption = "Runs; losses relative to the base's, at the end of the run"
    return Table(caption, ("run", "seed", "status", *probes), rows)


def _probe_cells(run: RunRecord) -> tuple[str, ...]:
    last, best = run.final, run.best
    if last is None or best is None or run.failure is not None:
        return (NOT_MEASURED,) * 5
    trained = run.probe(TRAIN)
    known = trained and probe_fault(trained[-1]) is None
    gap = f"{last['relative'] - trained[-1]['relative']:+z.4f}" if known else NOT_MEASURED
    return f"{last['relative']:.4f}", f"{last.get('se', 0):.4f}", f"{best['relative']:.4f}", str(best["step"]), gap


def diagnosis_table(arms: Sequence[ArmRuns]) -> Table | None:
    """A row per state that the last diagnosis in a run's log found; None where no run's log holds a diagnosis."""
    runs = named_runs(arms)
    if not any(run.events_of(*DIAGNOSED) for _, run in runs):
        return None
    rows = tuple((name, *cells) for name, run in runs for cells in _diagnosis_cells(run))
    return Table("Diagnosis at its last change", ("run", "state", "confidence", "evidence", "to try"), rows)


def _diagnosis_cells(run: RunRecord) -> Iterator[tuple[str, ...]]:
    if diagnoses := run.events_of("diagnosis"):
        for finding in diagnoses[-1]["findings"]:
            evidence = f"step {diagnoses[-1]['step']}: {finding['evidence']}"
            tries = [a["text"] + (f" ({a['key']}: {a['value']})" if "key" in a else "") for a in finding["advice"]]
            yield finding["state"], finding["confidence"] or "–", evidence, "; ".join(tries) or "–"
    elif run.events_of(*DIAGNOSED):
        yield "no fault told", "–", "the diagnosis followed the run and had nothing to say", "–"
    else:
        yield NOT_MEASURED, "–", "the log holds no diagnosis", "lora-trainer diagnose"


def sample_table(arms: Sequence[ArmRuns]) -> Table | None:
    """A row per prompt: the last samples of each trial, or of a single run its samples over steps; None without any."""
    runs = [run for arm in arms for run in arm.runs]
    if not any(run.samples for run in runs):
        return None
    if len(runs) == 1:
        steps = spread(sorted({step for step, _ in runs[0].samples}), MOST_SAMPLED_STEPS)
        rows = tuple(
            (text, *(_picture(runs[0].samples.get((step, number)), f"{text}, step {step}") for step in steps))
            for number, text in enumerate(runs[0].prompts, start=1)
        )
        caption = "Samples with equal image seeds as the training went on"
        return Table(caption, ("prompt", *map(step_name, steps)), rows)
    firsts = {arm.name: arm.runs[0] for arm in arms}
    prompts = dict.fromkeys(prompt for run in firsts.values() for prompt in run.prompts)
    rows = tuple((text, *(_last_picture(run, text, name) for name, run in firsts.items())) for text in prompts)
    seeds = sorted({run.seed for run in firsts.values()})
    which = f"training seed {seeds[0]}" if len(seeds) == 1 else "the first training seed of each"
    return Table(f"Last samples of each trial, equal image seeds, {which}", ("prompt", *firsts), rows)


def _last_picture(run: RunRecord, prompt: str, name: str) -> str:
    step = max((step for step, _ in run.samples), default=0)
    number = run.prompts.index(prompt) + 1 if prompt in run.prompts else None
    return _picture(run.samples.get((step, number)) if number else None, f"{prompt}, {name}, step {step}")


def _picture(file: Path | None, alt: str) -> str:
    """Small pictures as they are, larger ones as JPEG thumbnails, so that the page stays small."""
    if file is None:
        return "none"
    with Image.open(file) as image:
        if max(image.size) <= AS_IT_IS_PX:
            data, kind, (width, height) = file.read_bytes(), "png", image.size
        else:
            small = image.convert("RGB")
            small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=88)
            data, kind, (width, height) = buffer.getvalue(), "jpeg", small.size
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Markup('<img src="{}" alt="{}" width="{}" height="{}">').format(source, alt, width, height)


def differences_table(records: Sequence[RunRecord], arms: Sequence[ArmRuns]) -> Table | None:
    """The settings that differ between trials; None where there is one trial."""
    keys = varied(records)
    if len(arms) < 2 or not keys:
        return None
    identities = [arm.runs[0].identity for arm in arms]
    rows = tuple((key, *(_shown(values[key]) if key in values else "–" for values in identities)) for key in keys)
    return Table("Settings that differ", ("setting", *(arm.name for arm in arms)), rows)


def settings_table(run: RunRecord, name: str) -> Table:
    """Every setting and content that decides what is learned."""
    rows = tuple((key, _shown(value)) for key, value in sorted(run.identity.items()))
    return Table(f"Settings of {name}", ("setting", "value"), rows)


def cost_table(arms: Sequence[ArmRuns]) -> Table:
    """Time in updates and memory of every run."""
    rows = []
    for name, run in named_runs(arms):
        memory = NOT_MEASURED if run.peak_memory_gib is None else f"{run.peak_memory_gib:.2f} GiB"
        images = len(run.updates) * run.plan["global_batch"]
        speed = f"{images / run.training_s:.2f}" if run.training_s else NOT_MEASURED
        rows.append((name, str(run.step), f"{run.training_s:.0f} s", speed, memory))
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


def item_table(arms: Sequence[ArmRuns]) -> Table | None:
    """Each run against the one with the smallest held-out loss of its seed, paired by image; None without a pair.

    How well single runs are known against one another says nothing of seeds. They stand in the order given, and of
    equal losses the first is the smallest.
    """
    finals: dict[int, list[tuple[str, Row]]] = {}
    for name, run in ((arm.name, run) for arm in arms for run in arm.runs):
        if run.is_finished and run.failure is None and run.final is not None:
            finals.setdefault(run.seed, []).append((name, run.final))
    rows = []
    for seed, named in sorted(finals.items()):
        best, least = named.pop(smallest([final["relative"] for _, final in named]))
        for name, final in named:
            mean = paired([PERCENT * (a - b) for a, b in zip(least["items"], final["items"], strict=True)])
            cells = str(seed), str(mean.num), f"{mean.mean:z.3f} %", f"{mean.se:.3f}"
            rows.append((f"{best} − {name}", *cells))
    what = "the precision of these runs alone, no evidence about their settings"
    caption = f"Differences over held-out images, in percent of the base's loss: {what}"
    header = ("pair", "seed", "images", "difference of loss", "± over images")
    return Table(caption, header, tuple(rows)) if rows else None


def arms_table(verdict: Verdict) -> Table:
    """The arms by rank: LR, budget, loss, gain over the base with its interval over seeds."""
    rows = []
    for arm in verdict.arms:
        lrs, losses = (f"{arm.peak_lr:.3g}", f"{arm.lr_budget:.2f}"), list(arm.losses.values())
        loss = f"{np.mean(losses):.4f}" if losses else "–"
        gain = _gain([PERCENT * (1 - loss) for loss in losses], verdict.rules.level)
        rows.append((arm.name, *lrs, str(len(losses)), loss, gain, _place(arm, verdict)))
    header = ("trial", "peak LR", "LR budget", "seeds", "held-out loss", "gain over base", "place")
    caption = f"Trials by held-out loss at the end, relative to the base ({verdict.question.label})"
    return Table(caption, header, tuple(rows))


def _gain(gains: Sequence[float], level: float) -> str:
    """Mean gain in percent of the base's loss, and its t interval over seeds."""
    if len(gains) < 2:
        return f"{gains[0]:z.2f} %" if gains else "–"
    low, high = paired(gains).interval(level)
    return f"{np.mean(gains):z.2f} % ({low:z.2f} to {high:z.2f})"


def _place(arm: Arm, verdict: Verdict) -> str:
    if arm.failed:
        return arm.failure
    if arm in verdict.unbeaten:
        return "unbeaten" if len(verdict.unbeaten) == 1 else "tied"
    num_winners = sum(pair.worse is arm and pair.outcome == Outcome.BETTER for pair in verdict.pairs)
    return f"beaten by {num_winners}" if num_winners else Outcome.NOT_TESTED


def pair_name(pair: Pair) -> str:
    return f"{pair.better.name} − {pair.worse.name}"


def pairs_table(verdict: Verdict) -> Table:
    """Every pair: the difference in percent of the base's loss, intervals, adjusted p, sign share, what it shows."""
    rows = tuple((pair_name(pair), *_pair_cells(pair, verdict.rules.level)) for pair in verdict.pairs)
    header = ("pair", "difference of loss", "95 % interval", "adjusted interval", "adjusted p", "same sign", "shows")
    return Table("Paired differences of the held-out loss, in percent of the base's loss", header, rows)


def _pair_cells(pair: Pair, level: float) -> tuple[str, ...]:
    shows = f"{pair.outcome}: {pair.why}" if pair.why else str(pair.outcome)
    if pair.test is None or pair.adjusted_interval is None:
        return *["–"] * 5, shows
    difference, same_sign = f"{-PERCENT * pair.test.mean:z.3f} %", f"{same_sign_share(pair.differences):.0%}"
    intervals = _interval(pair.test.interval(level)), _interval(pair.adjusted_interval)
    return difference, *intervals, f"{pair.adjusted_p:.3g}", same_sign, shows


def _interval(bounds: tuple[float, float]) -> str:
    """Of worse minus better, told as better minus worse: negative is a smaller loss."""
    low, high = sorted(-PERCENT * bound for bound in bounds)
    return f"{low:z.3f} to {high:z.3f}"
