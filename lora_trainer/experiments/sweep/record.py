"""`sweep.json`: plan and results of a sweep, rebuilt from the trials' logs whenever asked. Never imports torch.

docs/sweeps.md has the format. It is replaced atomically, so it can be read while the sweep runs.

`sweep.prune.worse_after_seeds` compares only losses at the end of complete runs, under the rules of a verdict, so that
no schedule is judged before it came to its end. The level of 5 % is divided by the number of looks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from lora_trainer.config.identity import compare, completed, difference, refusal
from lora_trainer.config.places import CHECKPOINTS, GROUPS, METRICS_FILE, PLAN_FILE, TRIALS
from lora_trainer.errors import ConfigError, Problem, SystemSetupError, told_once
from lora_trainer.evidence.statistics.paired import levels
from lora_trainer.evidence.statistics.verdict import Arm, Outcome, Rules
from lora_trainer.evidence.statistics.verdict import compare as compare_arms
from lora_trainer.planning.prepare import Prepared
from lora_trainer.report.runs import SWEEP_FILE, is_left_out
from lora_trainer.storage.records import TRIAL, Finite, Text, Update, read_record, reason, shape
from lora_trainer.tracking.metrics import HELD_OUT, probe_fault, read_rows
from lora_trainer.training.group import Member, TrialGroup

Json = dict[str, Any]

FORMAT = 1
ENDED = ("finished", "failed", "stopped")
"""States of a trial that will not go on."""
NOTHING: Json = {"groups": [], "trials": []}
"""The record of a sweep that was never started."""
_CONTENTS = ("base content", "data content", "validation content")
_PROBE_FIELDS = ("step", "relative", "loss", "se", "items")
FEWER_SEEDS = "sweep.prune.worse_after_seeds"


_GROUP = shape({"name": Text, "trials": list[Text], "status": Text, "num_updates": Update})
_READING = shape({"step": Update, "relative": Finite})
_TRIAL = shape(
    {
        **TRIAL,
        "seed": int,
        "num_updates": Update,
        "overrides": dict[Text, Any],
        **dict.fromkeys(("group", "reason"), Text | None),
        **dict.fromkeys(("peak_lr", "lr_budget"), Finite),
        **dict.fromkeys(("final", "best"), _READING | None),
    }
)
_SWEEP = shape(
    {
        "format": Literal[1],
        "name": Text,
        "shared": dict[Text, Any],
        "groups": list[_GROUP],  # type: ignore[valid-type]
        "trials": Annotated[list[_TRIAL], Field(min_length=1)],  # type: ignore[valid-type]
    }
)
"""What is looked at of a record of ours."""
_PLANNED = shape({"identity": dict[Text, Any]})


def read_sweep(sweep_dir: Path) -> Json | None:
    """What an earlier start wrote; None where there is nothing.

    Raises:
        SystemSetupError: the file is no JSON of ours.
    """
    file = sweep_dir / SWEEP_FILE
    if not file.exists():
        return None
    try:
        return read_record(file, _SWEEP)
    except (OSError, ValueError) as error:
        fix = "restore it, or use --fresh"
        raise SystemSetupError(
            Problem("the record of this sweep cannot be read", str(file), reason(error), fix)
        ) from error


def started_groups(before: Json, sweep_dir: Path) -> dict[str, list[str]]:
    """The groups that an earlier start began, with their trials in order."""
    return {
        group["name"]: group["trials"]
        for group in before["groups"]
        if any((sweep_dir / GROUPS / group["name"] / CHECKPOINTS).glob("step-*"))
    }


def settled_groups(before: Json, prepared: Mapping[str, Prepared]) -> set[str]:
    """The finished groups whose trials were not given more updates since."""
    length = {name: trial.plan.num_steps for name, trial in prepared.items()}
    return {
        group["name"]
        for group in before["groups"]
        if group["status"] == "finished"
        and all(length.get(name, 0) <= group["num_updates"] for name in group["trials"])
    }


def check_continues(before: Json, prepared: Mapping[str, Prepared], sweep_dir: Path, settled: Collection[str]) -> None:
    """Refuse to mix trials of other data, other bases or other settings under the same names.

    Args:
        settled: groups that need none of their trials any more.

    Raises:
        ConfigError: naming every trial and setting that differs, and trials that began and are gone from the config.
    """
    if before is NOTHING:
        return
    problems = []
    if changes := difference(before["shared"], _contents(next(iter(prepared.values())))):
        what = "this sweep's trials had other data or another base"
        fix = "restore them, or give the new sweep another `name`"
        problems.append(Problem(what, str(sweep_dir), "; ".join(changes), fix))
    refusals = []
    for name, trial in prepared.items():
        folder = sweep_dir / TRIALS / name
        if (began_with := _stored_identity(folder)) is not None:
            identity = trial.identity()
            refused = compare(began_with, identity, trial.config.resume, "resume").refused
            if refused:
                refusals.append((f"`{name}`", refusal(began_with, identity, refused, str(sweep_dir / TRIALS))))
    problems += told_once(refusals, " ")
    for group, names in started_groups(before, sweep_dir).items():
        if group not in settled and (gone := [name for name in names if name not in prepared]):
            what = f"trials of the unfinished group {group} are no longer in the config: {', '.join(gone)}"
            fix = "put them back until the group is finished, or start anew with --fresh"
            problems.append(Problem(what, "sweep", fix=fix))
    if problems:
        raise ConfigError(*problems)


def _contents(prepared: Prepared) -> Json:
    return {key: value for key, value in prepared.identity().items() if key in _CONTENTS}


def _stored_identity(folder: Path) -> Json | None:
    try:
        return completed(read_record(folder / PLAN_FILE, _PLANNED)["identity"])
    except (OSError, ValueError):
        return None


def left_out(content: Json) -> dict[str, str]:
    """Trials that an earlier start decided not to begin, with the rule and its reason."""
    return {trial["name"]: trial["reason"] for trial in content["trials"] if is_left_out(trial)}


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


def describe_sweep(name: str, groups: Sequence[TrialGroup], before: Json) -> Json:
    """The record of a planned sweep; trials that were recorded before keep their places.

    Groups that are finished and no longer in the config stay as they were; so do trials that were not begun.
    """
    planned = {group.name for group in groups}
    kept = [g for g in before["groups"] if g["status"] == "finished" and g["name"] not in planned]
    rows = {member.name: _trial_row(member, group) for group in groups for member in group.members}
    stay = {name for group in kept for name in group["trials"]} | left_out(before).keys() | rows.keys()
    return {
        "format": FORMAT,
        "name": name,
        "shared": before.get("shared", _contents(groups[0].shared) if groups else {}),
        "groups": kept + [_group_row(group) for group in groups],
        "trials": list(({t["name"]: t for t in before["trials"] if t["name"] in stay} | rows).values()),
    }


def _group_row(group: TrialGroup) -> Json:
    return {
        "name": group.name,
        "seed": group.members[0].trial.seed,
        "num_updates": group.num_steps,
        "trials": [member.name for member in group.members],
        "trials_per_pass": group.trials_per_pass,
        "why": group.why,
        "status": "waiting",
        "step": 0,
    }


def _trial_row(member: Member, group: TrialGroup) -> Json:
    trial, lrs = member.trial, member.prepared.plan.param_groups[0]
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
        "num_updates": group.num_steps,
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
    done = {*finished, *(group["name"] for group in content["groups"] if group["status"] == "finished")}
    trials = [_with_results(trial, sweep_dir, done=trial["group"] in done) for trial in content["trials"]]
    groups = []
    for group in content["groups"]:
        step = max((trial["step"] for trial in trials if trial["group"] == group["name"]), default=0)
        status = "finished" if group["name"] in done else "running" if step else "waiting"
        groups.append({**group, "status": status, "step": step})
    return {**content, "groups": groups, "trials": trials}


def _with_results(trial: Json, sweep_dir: Path, *, done: bool) -> Json:
    """A trial's row with step, status and probes from its log; of one that was not begun, the row as it is."""
    if is_left_out(trial):
        return trial
    log = sweep_dir / trial["folder"] / METRICS_FILE
    rows = list(read_rows(log)) if log.exists() else []
    probes = [r for r in rows if r.get("event") == "validation" and r["probe"] == HELD_OUT and r["step"] > 0]
    measured = [{key: row[key] for key in _PROBE_FIELDS if key in row} for row in probes if probe_fault(row) is None]
    step = max((row["step"] for row in rows), default=0)
    ending = next((row for row in rows if row.get("event") in ("failed", "stopped")), None)
    if ending is None and done and probes and (fault := probe_fault(probes[-1])) is not None:
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


def unfinished_trials(content: Json) -> list[str]:
    """Trials that will go on."""
    return [trial["name"] for trial in content["trials"] if trial["status"] not in ENDED]


def arms_of(content: Json) -> list[Arm]:
    """Every arm, in their order, with the held-out losses of its finished seeds and why others have none.

    A seed that was begun and then stopped counts against its arm as one that failed does: else an arm would win on the
    seeds that it survived. One that was not begun counts as nothing.
    """
    rows: dict[str, list[Json]] = {}
    for trial in content["trials"]:
        rows.setdefault(trial["arm"], []).append(trial)
    return [_arm(name, trials) for name, trials in rows.items()]


def _arm(name: str, trials: list[Json]) -> Arm:
    first = trials[0]
    losses = {t["seed"]: float(t["final"]["relative"]) for t in trials if t["final"] is not None}
    ended = [t for t in trials if t["status"] in ("failed", "stopped") and not is_left_out(t)]
    failed = {t["seed"]: str(t["reason"]) for t in ended}
    return Arm(name, first["setting"], first["peak_lr"], first["lr_budget"], losses, failed)


def worse_arms(content: Json, after: int, num_seeds: int) -> dict[str, str]:
    """The arms that were shown to be worse than another and get no further seeds, with the reason.

    Args:
        after: finished seeds from which on an arm is judged.
        num_seeds: of the whole sweep.
    """
    arms = [arm for arm in arms_of(content) if arm.losses and not arm.failed]
    level = Rules().level / max(1, num_seeds - after)
    reasons: dict[str, str] = {}
    for pair in compare_arms(arms, Rules(level=level, min_seeds=after)):
        if pair.outcome == Outcome.BETTER and pair.test is not None:
            reasons.setdefault(
                pair.worse.name,
                f"{FEWER_SEEDS}: {pair.better.name} was better by {pair.test.mean:.4f} on {len(pair.seeds)} seeds "
                f"(adjusted p {pair.adjusted_p:.2g}, {level:.2g} needed)",
            )
    return reasons


def result_rows(content: Json) -> Iterator[tuple[str, str]]:
    """Trials by their last held-out loss, or their smallest while they are trained, relative to the base's.

    Those of equal loss stand in the order of the sweep.
    """

    def loss(trial: Json) -> float:
        probe = trial["final"] or trial["best"]
        return probe["relative"] if probe else float("inf")

    level = levels(map(loss, content["trials"]))
    for trial in sorted(content["trials"], key=lambda trial: level[loss(trial)]):
        words = [f"{trial['status']} at {trial['step']}/{trial['num_updates']}"]
        probes = {name: trial[name] for name in ("final", "best") if trial[name] is not None}
        words += [f"{name} {probe['relative']:.4f} (step {probe['step']})" for name, probe in probes.items()]
        if trial["reason"]:
            words.append(trial["reason"])
        yield trial["name"], ", ".join(words)
