"""What a group of trials leaves: each trial's own folder as a solo run writes it, and one checkpoint for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from lora_trainer.assembly import Assembly
from lora_trainer.checkpoint import Checkpoint, Progress
from lora_trainer.data.holdout import HELD_OUT
from lora_trainer.errors import HostError
from lora_trainer.probing import Measurement
from lora_trainer.recorder import Recorder, save_state
from lora_trainer.runtime import Runtime
from lora_trainer.sampling import Sampler
from lora_trainer.sweep.groups import TrialGroup
from lora_trainer.tracking.console import Screen, TrainingLine
from lora_trainer.update import UpdateResult
from lora_trainer.verdict.ties import levels

METRICS_BYTES, TRUNK = "metrics_bytes", "trunk"
"""What a group's checkpoint says of a trial: the length of its log, and which other one is still computed for it."""


class GroupRecorder:
    """One recorder per trial, in step; main process only.

    Args:
        identity: of the group, for its checkpoints.
        on_save: called after each checkpoint.
    """

    def __init__(
        self,
        group: TrialGroup,
        runtime: Runtime,
        parts: Assembly,
        identity: Mapping[str, Any],
        screen: Screen,
        on_save: Callable[[], None],
    ) -> None:
        self._group, self._parts, self._identity = group, parts, identity
        self._screen, self._on_save = screen, on_save
        shared, silent = group.shared, Screen(silent=True)
        self._sampler = Sampler(
            parts.family, parts.denoiser, parts.cache.prompts, shared.config, shared.prediction_type, runtime
        )
        self._recorders = [
            Recorder(member.prepared, runtime, parts.family, parts.bank, [trial], parts.updater, self._sampler, silent)
            for member, trial in zip(group.members, parts.trials, strict=True)
        ]
        self._ended = {trial.name for trial in parts.trials if not trial.is_live}

    def open(self, checkpoint: Checkpoint | None) -> None:
        """Continue every log where the checkpoint left it."""
        for recorder in self._recorders:
            start = Progress()
            if checkpoint is not None:
                own = checkpoint.state["plain"][recorder.trial.name]
                start = replace(checkpoint.progress, metrics_bytes=own[METRICS_BYTES])
            recorder.open(start, resuming=checkpoint is not None)
        if checkpoint is not None:
            self._screen.say(f"resuming after step {checkpoint.progress.step} of {self._group.num_updates}")

    def close(self) -> None:
        for recorder in self._recorders:
            recorder.close()

    def update(self, progress: Progress, result: UpdateResult, seconds: float, line: TrainingLine) -> None:
        """A row in the log of every trial, one line on the screen for all."""
        rows = [row for recorder in self._recorders for row in recorder.log(progress, result, seconds)]
        if rows:
            losses = [row.loss for row in rows]
            numbers = f"{len(rows)} trials, loss {min(losses):.4f} .. {max(losses):.4f}, {seconds:.2f} s/update"
            line.show(progress.step, numbers)
        self._note_endings()

    def prove(self, progress: Progress) -> None:
        """That every layer of every trial learns, in its own log."""
        for recorder in self._live():
            recorder.prove(progress)

    def skip(self, progress: Progress, result: UpdateResult) -> None:
        """A skipped update, in the log of every trial."""
        for recorder in self._recorders:
            recorder.skip(progress, result)

    def validation(self, progress: Progress, measured: Sequence[Measurement]) -> None:
        """The probes in each trial's log, the best three on the screen."""
        for recorder in self._recorders:
            recorder.validation(progress, [each for each in measured if each.trial is recorder.trial])
        losses = {each.trial.name: each.readings[HELD_OUT].relative for each in measured}
        level = levels(filter(math.isfinite, losses.values()))
        leading = sorted((name for name in losses if losses[name] in level), key=lambda name: level[losses[name]])[:3]
        if progress.step and leading:
            said = ", ".join(f"{name} {losses[name]:.4f}" for name in leading)
            self._screen.say(f"step {progress.step}: held-out loss over the base's, smallest first: {said}")
        self._note_endings()

    def save(self, progress: Progress, *, now: bool) -> None:
        """One checkpoint for all trials, where it is due or the group ends here."""
        lead, period = self._recorders[0], self._group.shared.plan.periods.checkpoint
        if not (now or (progress.owed and period is not None and progress.step % period == 0)):
            return
        with self._disk_faults(progress, needed=now and progress.step < self._group.num_updates):
            states = [recorder.trial.state() for recorder in self._recorders]
            plain = {
                recorder.trial.name: {
                    **own,
                    METRICS_BYTES: recorder.mark_checkpoint(progress),
                    TRUNK: None if recorder.trial.trunk is None else recorder.trial.trunk.name,
                }
                for recorder, (_, own) in zip(self._recorders, states, strict=True)
            }
            folder, scaler = self._group.folder / "checkpoints", self._parts.updater.state()
            save_state(folder, progress, [parts for parts, _ in states], plain, self._identity, scaler)
            lead.prune_checkpoints(folder)
        self._on_save()

    @contextmanager
    def _disk_faults(self, progress: Progress, *, needed: bool) -> Iterator[None]:
        """As for a solo run; where the group has to stop, every trial keeps a LoRA of this step."""
        lead, *others = self._live() or self._recorders
        try:
            with lead.disk_faults(progress, "checkpoint", needed=needed):
                yield
        except HostError:
            for recorder in others:
                recorder.rescue(progress)
            raise

    def deliver(self, progress: Progress) -> None:
        """Exports and samples due after an update, of every trial that goes on."""
        for recorder in self._live():
            recorder.deliver(progress)

    def finish(self, progress: Progress) -> None:
        """The LoRA of every trial that came to the end; the sweep's report has the pictures of all."""
        live = self._live()
        for recorder in self._screen.track(live, "exporting", len(live)):
            recorder.conclude(progress)

    def sample(self, progress: Progress) -> None:
        """What the base draws: the same for every trial, so drawn once."""
        images = self._recorders[0].draw()
        for recorder in self._recorders:
            recorder.keep_samples(progress, images)

    def _live(self) -> list[Recorder]:
        return [recorder for recorder in self._recorders if recorder.trial.is_live]

    def _note_endings(self) -> None:
        for recorder in self._recorders:
            name, ending = recorder.trial.name, recorder.trial.ending
            if ending is not None and name not in self._ended:
                self._ended.add(name)
                recorder.end(ending)
                self._screen.say(f"{name} {ending.status} after step {ending.step}: {ending.reason}; the others go on")
