"""`sweep.json`: plan and results of a sweep, rebuilt from the trials' logs whenever asked. Never imports torch.

docs/sweeps.md has the format. It is replaced atomically, so it can be read while the sweep runs.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_trainer.config.identity import compare, difference, refusal
from lora_trainer.config.places import CHECKPOINTS, GROUPS, METRICS_FILE, PLAN_FILE, TRIALS
from lora_trainer.errors import ConfigError, HostError, Problem
from lora_trainer.planning.prepare import Prepared
from lora_trainer.storage import atomic_files
from lora_trainer.tracking.metrics import HELD_OUT, probe_fault, read_rows
from lora_trainer.training.group import Member, TrialGroup

FORMAT = 1
FILE = "sweep.json"
CONTENTS = ("base content", "data content", "validation content")
ENDED = ("finished", "failed", "stopped")
"""States of a trial that will not go on."""
_PROBE_FIELDS = ("step", "relative", "loss", "se", "items")

Json = dict[str, Any]


def read_sweep(sweep_dir: Path) -> Json | None:
    """What an earlier start wrote; None where there is nothing.

    Raises:
        HostError: the file is no JSON of ours.
    """
    file = sweep_dir / FILE
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text())
        if content["format"] == FORMAT:
            return content
        fault = f"its format is {content['format']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        fault = str(error)
    raise HostError(Problem("the record of this sweep cannot be read", str(file), fault, "restore it, or use --fresh"))


def started_groups(before: Json | None, sweep_dir: Path) -> dict[str, list[str]]:
    """The groups that an earlier start began, with their trials in order."""
    groups = [] if before is None else before["groups"]
    return {
        g["name"]: g["trials"] for g in groups if any((sweep_dir / GROUPS / g["name"] / CHECKPOINTS).glob("step-*"))
    }


def finished_groups(before: Json | None) -> set[str]:
    return set() if before is None else {g["name"] for g in before["groups"] if g["status"] == "finished"}


def settled_groups(before: Json | None, prepared: Mapping[str, Prepared]) -> set[str]:
    """The finished groups whose trials were not given more updates since."""
    done = finished_groups(before)
    longer = {
        group["name"]
        for group in (before or {"groups": []})["groups"]
        for name in group["trials"]
        if name in prepared and prepared[name].plan.num_updates > group["num_updates"]
    }
    return done - longer


def check_continues(
    before: Json | None, prepared: Mapping[str, Prepared], sweep_dir: Path, settled: Collection[str]
) -> None:
    """Refuse to mix trials of other data, other bases or other settings under the same names.

    Args:
        settled: groups that need none of their trials any more.

    Raises:
        ConfigError: naming every trial and setting that differs, and trials that began and are gone from the config.
    """
    if before is None:
        return
    problems = []
    now = {key: value for key, value in next(iter(prepared.values())).identity().items() if key in CONTENTS}
    if changes := difference(before["shared"], now):
        problems.append(
            Problem(
                "this sweep's trials had other data or another base",
                str(sweep_dir),
                "; ".join(changes),
                "restore them, or give the new sweep another `name`",
            )
        )
    for name, own in prepared.items():
        folder = sweep_dir / TRIALS / name
        if (identity := _stored_identity(folder)) is not None:
            refused = compare(identity, own.identity(), own.config.resume, "resume").refused
            if refused:
                problems.append(refusal(name, identity, own.identity(), refused, str(folder)))
    for group, names in started_groups(before, sweep_dir).items():
        if group not in settled and (gone := [name for name in names if name not in prepared]):
            problems.append(
                Problem(
                    f"trials of the unfinished group {group} are no longer in the config: {', '.join(gone)}",
                    "sweep",
                    fix="put them back until the group is finished, or start anew with --fresh",
                )
            )
    if problems:
        raise ConfigError(*problems)


def _stored_identity(folder: Path) -> Json | None:
    try:
        return json.loads((folder / PLAN_FILE).read_text())["identity"]
    except (OSError, ValueError, KeyError):
        return None


def never_begun(before: Json | None) -> dict[str, str]:
    """Trials that an earlier start decided not to begin, with the rule and its reason."""
    trials = [] if before is None else before["trials"]
    return {trial["name"]: trial["reason"] for trial in trials if trial["status"] == "stopped" and not trial["step"]}


def without_dropped(content: Json, dropped: Mapping[str, str]) -> Json:
    """The record with trials that are not begun, and the reason of each."""
    trials = [
        {**trial, "group": None, "status": "stopped", "reason": dropped[trial["name"]]}
        if trial["name"] in dropped
        else trial
        for trial in content["trials"]
    ]
    groups = [{**g, "trials": [name for name in g["trials"] if name not in dropped]} for g in content["groups"]]
    return {**content, "groups": [group for group in groups if group["trials"]], "trials": trials}


def describe_sweep(name: str, groups: Sequence[TrialGroup], before: Json | None) -> Json:
    """The record of a planned sweep.

    Groups that are finished and no longer in the config stay as they were; so do trials that were not begun.
    """
    planned = {group.name for group in groups}
    kept = [g for g in (before or {"groups": []})["groups"] if g["status"] == "finished" and g["name"] not in planned]
    stay = {name for group in kept for name in group["trials"]} | {*never_begun(before)}
    stay -= {member.name for group in groups for member in group.members}
    kept_trials = [t for t in (before or {"trials": []})["trials"] if t["name"] in stay]
    identity = groups[0].shared.identity() if groups else {}
    shared = {key: value for key, value in identity.items() if key in CONTENTS} if before is None else before["shared"]
    return {
        "format": FORMAT,
        "name": name,
        "shared": shared,
        "groups": kept + [_group_row(group) for group in groups],
        "trials": _in_order(
            [*kept_trials, *(_trial_row(member, group) for group in groups for member in group.members)], before
        ),
    }


def _in_order(trials: Sequence[Json], before: Json | None) -> list[Json]:
    """Trials that were recorded before stay in their order; new ones follow."""
    known = [trial["name"] for trial in (before or {"trials": []})["trials"]]
    place = {name: index for index, name in enumerate(known)}
    return sorted(trials, key=lambda trial: place.get(trial["name"], len(known)))


def _group_row(group: TrialGroup) -> Json:
    return {
        "name": group.name,
        "seed": group.members[0].trial.seed,
        "num_updates": group.num_updates,
        "trials": [member.name for member in group.members],
        "trials_per_pass": group.trials_per_pass,
        "why": group.why,
        "status": "waiting",
        "step": 0,
    }


def _trial_row(member: Member, group: TrialGroup) -> Json:
    trial, lrs = member.trial, member.prepared.plan.lr_groups[0]
    return {
        "name": trial.name,
        "arm": trial.arm,
        "setting": trial.setting,
        "seed": trial.seed,
        "group": group.name,
        "folder": f"{TRIALS}/{trial.name}",
        "overrides": dict(trial.overrides),
        "schedule": lrs.schedule,
        "peak_lr": lrs.lr_peak,
        "lr_budget": lrs.lr_budget,
        "num_updates": group.num_updates,
        "status": "waiting",
        "step": 0,
        "reason": None,
        "final": None,
        "best": None,
        "shares_until": None if member.prefix is None else {"trunk": member.prefix.parent, "step": member.prefix.step},
    }


def refreshed(content: Json, sweep_dir: Path, finished: Sequence[str] = ()) -> Json:
    """The same record with what the logs say now.

    Args:
        finished: groups that are known to be done, with all their files.
    """
    done = {*finished, *finished_groups(content)}
    trials = [_with_results(trial, sweep_dir, done=trial["group"] in done) for trial in content["trials"]]
    groups = []
    for group in content["groups"]:
        own = [trial for trial in trials if trial["group"] == group["name"]]
        status = "finished" if group["name"] in done else "running" if any(t["step"] for t in own) else "waiting"
        groups.append({**group, "status": status, "step": max((trial["step"] for trial in own), default=0)})
    return {**content, "groups": groups, "trials": trials}


def _with_results(trial: Json, sweep_dir: Path, *, done: bool) -> Json:
    """A trial's row with step, status and probes from its log; of one that was not begun, the row as it is."""
    if never_begun({"trials": [trial]}):
        return trial
    log = sweep_dir / trial["folder"] / METRICS_FILE
    rows = list(read_rows(log)) if log.exists() else []
    probes = [r for r in rows if r.get("event") == "validation" and r["probe"] == HELD_OUT]
    readings = [row for row in probes if row["step"] > 0]
    measured = [{key: row[key] for key in _PROBE_FIELDS} for row in readings if probe_fault(row) is None]
    step = max((row["step"] for row in rows), default=0)
    ending = next((row for row in rows if row.get("event") in ("failed", "stopped")), None)
    if ending is None and done and readings and (fault := probe_fault(readings[-1])) is not None:
        ending = {"event": "failed", "step": step, "reason": fault}
    status = ending["event"] if ending else "finished" if done else "running" if rows else "waiting"
    return {
        **trial,
        "status": status,
        "step": ending["step"] if ending else step,
        "reason": ending["reason"] if ending else None,
        "final": measured[-1] if measured and status == "finished" else None,
        "best": min(measured, key=lambda probe: probe["relative"], default=None),
    }


def write_sweep(sweep_dir: Path, content: Json) -> None:
    atomic_files.write_json(sweep_dir / FILE, content)
