"""Where a group goes on: its newest whole checkpoint, whether these settings may continue it, and its return to it.

A checkpoint's JSON (format 2): `step`, `trials_per_pass`, `owes_probe` where the probe due at that step was refused its
memory, and by trial its `identity`, `metrics_bytes` (the length of its log), `parent` (the trial whose updates it still
shares) and the state of `Trial.state`. Tensors are named `<trial>/<component>.<layer>.lora_A.weight`. Format 1 had no
component in its names, one loss scale for all trials, and a second counter for skipped updates; it is read as if
format 2 had written it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lora_trainer.config.identity import compare, completed, difference, refusal
from lora_trainer.config.places import METRICS_FILE
from lora_trainer.errors import ConfigError, Problem, told_once
from lora_trainer.planning.prepare import check_kept_curve, check_not_lost
from lora_trainer.runtime.runtime import Runtime, choose_precision, from_main
from lora_trainer.storage.checkpoint import Checkpoint, newest_checkpoint
from lora_trainer.tracking.console import MainConsole
from lora_trainer.training.group import TrialGroup
from lora_trainer.training.trial import Ending, Skips, Tensors, Trial

FORMAT_1_COMPONENT = "unet"
"""What every adapter of format 1 was on."""


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """A checkpoint as the group of today sees it."""

    checkpoint: Checkpoint
    step: int
    trials_per_pass: int
    trials: Mapping[str, dict[str, Any]]
    """What is stored of each member, by the name that it has now."""
    names: Mapping[str, str]
    """The name that each member had when it was saved."""

    @property
    def endings(self) -> dict[str, Ending | None]:
        """By trial; None where it goes on, or came to the planned end."""
        stored = {name: trial["ending"] for name, trial in self.trials.items()}
        return {name: None if ending is None else Ending(**ending) for name, ending in stored.items()}


def find_resume_point(group: TrialGroup, runtime: Runtime, console: MainConsole) -> ResumePoint | None:
    """The newest whole checkpoint of this group; None where it starts at its beginning, which is said if it did before.

    Raises:
        ConfigError: it holds a run, or trials, with another identity.
        SystemSetupError: there were checkpoints and none can be read, or a finished run has lost them.
    """
    checkpoint = from_main(runtime.launch, _newest(group, console) if runtime.launch.is_main else None)
    if checkpoint is None:
        return None
    point = _point(checkpoint, group)
    if checkpoint.state["format"] == 1 and (tried := checkpoint.state["progress"]["attempt"]) != point.step:
        console.print(
            f"{tried - point.step} update(s) that an earlier version skipped are not made up for: update {point.step} "
            "has its own images and noise again"
        )
    return _accept(point, group, runtime, console)


def _newest(group: TrialGroup, console: MainConsole) -> Checkpoint | None:
    checkpoint, faults = newest_checkpoint(group.checkpoints)
    for fault in faults:
        console.print(fault)
    silent = checkpoint is not None or group.log_only
    for prepared in (member.prepared for member in group.members) if not silent else ():
        check_not_lost(prepared.config)
        if (prepared.run_dir / METRICS_FILE).exists():
            console.print("an earlier start ended before its first checkpoint; this one begins at step 0 again")
            break
    return checkpoint


def _point(checkpoint: Checkpoint, group: TrialGroup) -> ResumePoint:
    state = _as_format_2(checkpoint.state)
    stored, now = state["trials"], [member.name for member in group.members]
    names = dict(zip(now, stored, strict=True)) if len(now) == len(stored) == 1 else {name: name for name in now}
    if missing := [name for name, before in names.items() if before not in stored]:
        fix = "restore sweep.json beside it, or start anew with --fresh"
        raise ConfigError(Problem(f"no checkpoint knows {', '.join(missing)}", str(group.folder), fix=fix))
    trials = {name: stored[before] for name, before in names.items()}
    return ResumePoint(checkpoint, state["step"], state["trials_per_pass"], trials, names)


def _as_format_2(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The JSON of a checkpoint, whichever format wrote it."""
    if state["format"] > 1:
        return state
    progress, identity, scaler = state["progress"], state["identity"], state["scaler"]
    trials = {}
    for name, plain in state["plain"].items():
        values = {f"{FORMAT_1_COMPONENT}.{place}": value for place, value in plain["optimizer"]["values"].items()}
        trials[name] = {
            **plain,
            "optimizer": {**plain["optimizer"], "values": values},
            "identity": completed(identity["trials"][name] if "trials" in identity else identity),
            "metrics_bytes": plain.get("metrics_bytes", progress["metrics_bytes"]),
            "parent": plain.get("trunk"),
            "skips": asdict(Skips(progress["attempt"] - progress["step"])),
            "scaler": scaler,
        }
    return {"step": progress["step"], "trials_per_pass": identity.get("trials_per_pass", 1), "trials": trials}


def _accept(point: ResumePoint, group: TrialGroup, runtime: Runtime, console: MainConsole) -> ResumePoint:
    """The same point where every difference is allowed; what differs is said once.

    A run that ended because its numbers were not finite goes on where a setting was changed.

    Raises:
        ConfigError: naming everything else that differs.
    """
    refusals, notes, trials = list[tuple[str, Problem]](), dict[str, None](), dict(point.trials)
    if group.trials_per_pass not in ("auto", point.trials_per_pass):
        change = f"{point.trials_per_pass} -> {group.trials_per_pass}"
        notes[f"changed since the last start: sweep.trials_per_pass: {change}"] = None
    for member in group.members:
        prepared, stored = member.prepared, point.trials[member.name]
        now = prepared.identity() | runtime.facts()
        if stored["identity"].get("train.precision") == "auto" != prepared.config.train.precision:
            meant = {"train.precision": choose_precision("auto", runtime.device)}  # format 1 did not say what it became
            stored = stored | {"identity": stored["identity"] | meant}
        changes = compare(stored["identity"], now, prepared.config.resume, str(group.folder))
        if changes.refused:
            refusals.append((f"`{member.name}`", refusal(stored["identity"], now, changes.refused, str(group.folder))))
        notes |= dict.fromkeys(
            f"changed since the last start: {line}"
            for line in difference(stored["identity"], now, [*changes.accepted, *changes.noted])
        )
        if changes.unknown:
            notes[f"not recorded by the earlier version, taken as unchanged: {', '.join(changes.unknown)}"] = None
        ending, is_alone = point.endings[member.name], group.folder == prepared.run_dir
        if is_alone and changes.accepted and ending is not None and ending.status == "failed":
            trials[member.name] = stored | {"ending": None, "skips": asdict(Skips(stored["skips"]["total"]))}
    if refusals:
        raise ConfigError(*told_once(refusals, " "))
    for member in group.members:
        check_kept_curve(member.prepared)
    for note in notes:
        console.print(note)
    return replace(point, trials=trials)


def restore(point: ResumePoint | None, group: TrialGroup, trials: Sequence[Trial]) -> int:
    """Bring every trial to its state at the resume point, and let those share updates that do; the first step."""
    by_name = {trial.name: trial for trial in trials}
    if point is not None:
        tensors = _tensors(point.checkpoint)
        for trial in trials:
            trial.load_state(tensors[point.names[trial.name]], point.trials[trial.name])
    for member in group.members:
        prefix = member.prefix
        if prefix is not None and (point is None or point.trials[member.name]["parent"] == prefix.parent):
            by_name[member.name].share(by_name[prefix.parent], prefix.step)
    return 0 if point is None else point.step


def stored_trial(checkpoint: Checkpoint) -> tuple[int, dict[str, Tensors]]:
    """Step and tensors, by part and name, of the one trial in a run's checkpoint."""
    (parts,) = _tensors(checkpoint).values()
    return _as_format_2(checkpoint.state)["step"], parts


def _tensors(checkpoint: Checkpoint) -> dict[str, dict[str, Tensors]]:
    """By the trial's name in the checkpoint, by part, and by their names in format 2."""
    trials: dict[str, dict[str, Tensors]] = {}
    for part, tensors in checkpoint.tensors().items():
        for key, tensor in tensors.items():
            trial, _, name = key.partition("/")
            name = name if checkpoint.state["format"] > 1 else f"{FORMAT_1_COMPONENT}.{name}"
            trials.setdefault(trial, {}).setdefault(part, {})[name] = tensor
    return trials
