"""The whole run, from a plan to the files in the run directory. Read it from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_trainer import atomicio
from lora_trainer.adapters.bank import AdapterBank
from lora_trainer.cache import Cache, build_cache
from lora_trainer.checkpoint import Checkpoint, Progress, newest_checkpoint, save_checkpoint
from lora_trainer.config.identity import difference
from lora_trainer.config.load import to_yaml
from lora_trainer.config.places import diffusers_lora_file, lora_file
from lora_trainer.data.batches import BatchSource
from lora_trainer.errors import ConfigError, NumericStop, Problem, StoppedBySignal
from lora_trainer.export.lora_files import base_facts, write_lora
from lora_trainer.export.recipe import recipe_of
from lora_trainer.families.registry import open_family
from lora_trainer.objective import Objective
from lora_trainer.prepare import Prepared, files_to_come
from lora_trainer.report.curves import draw_curves
from lora_trainer.report.sample_grid import draw_grid
from lora_trainer.runtime import Runtime, environment_report, start_runtime
from lora_trainer.sampling import Sampler, save_samples
from lora_trainer.tracking.console import Screen, TrainingLine
from lora_trainer.tracking.metrics import MetricsLog, StepRow
from lora_trainer.tracking.tensorboard import TensorBoardLog
from lora_trainer.trial import Trial, TrialSpec
from lora_trainer.update import Updater, UpdateResult

MAX_SKIPS_IN_A_ROW = 3
MAX_OVERFLOWS_IN_A_ROW = 30  # fp16's scale halves at each: more than enough to come down from 2**16


@dataclass(frozen=True, slots=True)
class FitResult:
    """Where a finished run left its files."""

    step: int
    files: tuple[Path, ...]


def fit(
    prepared: Prepared,
    specs: Sequence[TrialSpec],
    *,
    screen: Screen,
    should_stop: Callable[[], bool] = lambda: False,
) -> FitResult:
    """Train the trials of one plan to the end, resuming from the newest checkpoint where there is one.

    Args:
        should_stop: asked after every update; when it says so, the state is saved and the run ends.

    Raises:
        StoppedBySignal: `should_stop` said so; the same call resumes.
        NumericStop: updates were skipped too often in a row; the last good state is saved.
        ConfigError: the run directory holds a run with another identity.
        TrainerError: the data, base, host or disk is at fault.
    """
    config, plan = prepared.config, prepared.plan
    with start_runtime(prepared.launch, config.train.precision, prepared.threads) as runtime:
        checkpoint = _find_checkpoint(prepared, runtime, screen)
        if _is_finished(prepared, checkpoint):
            screen.say("this run is finished; nothing to do")
            return FitResult(plan.num_updates, tuple(files_to_come(config, plan)))
        if runtime.launch.is_main:
            _write_run_files(prepared, runtime)
        family = open_family(prepared.base)
        cache = build_cache(config, family, prepared.dataset, prepared.base_digests, runtime, screen.track)
        _say_cache(cache, screen)
        denoiser = family.load_denoiser(runtime.device, runtime.dtype)
        adapters = [f"trial{index}" for index in range(len(specs))]
        bank = AdapterBank.attach(denoiser, config.adapter, list(prepared.target_shapes), adapters, seed=config.seed)
        if config.train.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        denoiser.train()
        trials = [Trial.build(spec, bank, name, plan) for spec, name in zip(specs, adapters, strict=True)]
        objective = Objective(config.objective, family.noise_schedule, prepared.prediction_type, runtime.device)
        updater = Updater(
            family,
            bank,
            trials,
            _batches(prepared, cache, runtime),
            objective,
            runtime,
            seed=config.seed,
            accumulation=plan.accumulation,
        )
        sampler = Sampler(
            family, denoiser, cache.prompts, config.sample, config.data.resolution, prepared.prediction_type, runtime
        )
        run = _Run(prepared, runtime, family, bank, trials, updater, sampler, screen, should_stop)
        run.restore(checkpoint)
        try:
            run.train()
        finally:
            run.close()
        runtime.wait_for_everyone()
    return FitResult(run.progress.step, tuple(files_to_come(config, plan)))


class _Run:
    """The loop and what happens around it: log, sample, checkpoint, export. Only the main process writes."""

    def __init__(
        self,
        prepared: Prepared,
        runtime: Runtime,
        family: Any,
        bank: AdapterBank,
        trials: Sequence[Trial],
        updater: Updater,
        sampler: Sampler,
        screen: Screen,
        should_stop: Callable[[], bool],
    ) -> None:
        self.prepared, self.config, self.plan = prepared, prepared.config, prepared.plan
        self.runtime, self.family, self.bank, self.trials = runtime, family, bank, list(trials)
        self.updater, self.sampler, self.screen, self.should_stop = updater, sampler, screen, should_stop
        self.progress = Progress()
        self.run_dir = prepared.run_dir
        self.is_main = runtime.launch.is_main

    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Start where the checkpoint left off, or at 0; open the logs there."""
        if checkpoint is not None:
            parts, plain = checkpoint.parts(), checkpoint.state["plain"]
            for trial in self.trials:
                trial.load_state(parts, plain[trial.name])
            self.updater.load_state(checkpoint.state["scaler"])
            self.progress = checkpoint.progress
        self.resumed_at_end = self.progress.step == self.plan.num_updates
        if not self.is_main:
            return
        self.metrics = MetricsLog(self.run_dir / "metrics.jsonl", keep_bytes=self.progress.metrics_bytes)
        self.tensorboard = None
        if self.config.tracking.tensorboard:
            self.tensorboard = TensorBoardLog(self.run_dir / "tensorboard", start_step=self.progress.step)
        if checkpoint is not None:
            self.metrics.event("resume", self.progress.step)
            self.screen.say(f"resuming after step {self.progress.step} of {self.plan.num_updates}")

    def train(self) -> None:
        """Updates until the planned number is done; then everything is exported."""
        skips = 0
        if self.progress.step == 0:
            self.sample()
        with self.screen.training(self.plan.num_updates, self.progress.step) as line:
            while self.progress.step < self.plan.num_updates:
                started = time.perf_counter()
                attempt, step = self.progress.attempt, self.progress.step
                result = self.updater.run(attempt, step, stop_asked=self.should_stop())
                applied = result.skipped is None
                self.progress = Progress(step + applied, attempt + 1)
                skips = 0 if applied else skips + 1
                if applied:
                    self.log(result, time.perf_counter() - started, line)
                    self.after_update()
                else:
                    self.log_skip(result, skips)
                if result.stop_asked and self.progress.step < self.plan.num_updates:
                    self.checkpoint()
                    raise StoppedBySignal(
                        Problem(
                            f"stopped as asked after step {self.progress.step} of {self.plan.num_updates}; all saved",
                            fix="the same command resumes here",
                        )
                    )
        self.finish()

    def log(self, result: UpdateResult, seconds: float, line: TrainingLine) -> None:
        if not self.is_main:
            return
        for name, trial in result.trials.items():
            row = StepRow(
                step=self.progress.step,
                attempt=self.progress.attempt,
                trial=name,
                epoch=self.progress.attempt / self.plan.updates_per_epoch,
                loss=trial.loss,
                lr=trial.lr,
                grad_norm=trial.grad_norm,
                clipped=trial.clipped,
                images_per_s=result.num_samples / seconds,
                peak_memory_gib=self.runtime.peak_memory_gib(),
            )
            self.metrics.step(row)
            if self.tensorboard is not None:
                self.tensorboard.step(row)
            line.step(row)

    def log_skip(self, result: UpdateResult, skips: int) -> None:
        """Write down a skipped update; stop after too many in a row, with the last good state saved."""
        files = ", ".join(result.files)
        if self.is_main:
            self.metrics.event(
                "skip",
                self.progress.step,
                attempt=self.progress.attempt,
                reason=result.skipped,
                files=list(result.files),
            )
            self.screen.say(f"attempt {self.progress.attempt} skipped: {result.skipped} not finite ({files})")
        overflow = result.skipped == "fp16 overflow"
        if skips >= (MAX_OVERFLOWS_IN_A_ROW if overflow else MAX_SKIPS_IN_A_ROW):
            self.checkpoint()
            raise NumericStop(
                Problem(
                    f"{skips} updates in a row had a {result.skipped} that is not finite; the state of step "
                    f"{self.progress.step} is saved",
                    f"images {files}",
                    fix="lower optimizer.lr (a tenth), use precision bf16 or fp32, and look at the images named",
                )
            )

    def after_update(self) -> None:
        """What is due after a completed update; the last one's is left to `finish`."""
        step, periods = self.progress.step, self.plan.periods
        if step == self.plan.num_updates:
            return
        if _due(step, periods.export):
            self.export(numbered=True)
        if _due(step, periods.checkpoint):
            self.checkpoint()
        if _due(step, periods.sample):
            self.sample()

    def finish(self) -> None:
        """The last checkpoint, the LoRA, the last samples and the pictures."""
        if not self.resumed_at_end:
            self.checkpoint()
        self.export(numbered=False)
        self.sample()
        if self.is_main:
            draw_curves(self.run_dir / "metrics.jsonl", self.run_dir / "curves.png", self.config.name)
            if self.config.sample.prompts:
                texts = [prompt.prompt for prompt in self.config.sample.prompts]
                draw_grid(self.run_dir / "samples", texts, self.run_dir / "samples" / "grid.png")

    def checkpoint(self) -> None:
        if not self.is_main:
            return
        parts: dict[str, dict[str, Any]] = {}
        plain = {}
        for trial in self.trials:
            own, plain[trial.name] = trial.state()
            for part, tensors in own.items():
                parts.setdefault(part, {}).update(tensors)
        self.metrics.event("checkpoint", self.progress.step)
        self.progress = Progress(self.progress.step, self.progress.attempt, self.metrics.sync())
        save_checkpoint(
            self.run_dir / "checkpoints",
            self.progress,
            parts,
            plain=plain,
            identity=self.prepared.identity(),
            scaler=self.updater.state(),
            keep_last=self.config.checkpoint.keep_last,
        )

    def export(self, *, numbered: bool) -> None:
        """The LoRA files of the first trial: the average where one is kept, else the adapter itself."""
        if not self.is_main:
            return
        step, weights = self.progress.step, self.weights(self.trials[0])
        facts = base_facts(self.family, self.prepared.prediction_type)
        recipe = recipe_of(self.config, self.plan, facts, step)
        file = lora_file(self.config, step if numbered else None)
        write_lora(file, weights, recipe, self.family, "kohya", self.config.export.dtype)
        if not numbered:
            file = diffusers_lora_file(self.config)
            write_lora(file, weights, recipe, self.family, "diffusers", self.config.export.dtype)

    def sample(self) -> None:
        """Images of the prompts with what would be exported now."""
        if not self.is_main or not self.config.sample.prompts:
            return
        trial = self.trials[0]
        with self.bank.active([trial.adapter]), self.bank.swapped(trial.adapter, self.weights(trial)):
            images = self.sampler.draw()
        files = save_samples(self.run_dir / "samples", self.progress.step, images)
        self.metrics.event("sample", self.progress.step, files=[file.name for file in files])

    def weights(self, trial: Trial) -> dict[str, Any]:
        return self.bank.state(trial.adapter) if trial.average is None else trial.average.tensors

    def close(self) -> None:
        if self.is_main:
            self.metrics.close()
            if self.tensorboard is not None:
                self.tensorboard.close()


def _find_checkpoint(prepared: Prepared, runtime: Runtime, screen: Screen) -> Checkpoint | None:
    """The newest whole checkpoint, if this run directory holds one of the same identity."""
    found, faults = newest_checkpoint(prepared.run_dir / "checkpoints") if runtime.launch.is_main else (None, [])
    for fault in faults:
        screen.say(fault)
    found = runtime.from_main(found)
    if found is not None:
        check_identity(found.identity, prepared.identity(), prepared.run_dir)
    return found


def _is_finished(prepared: Prepared, checkpoint: Checkpoint | None) -> bool:
    """Whether the last update is done and all its files are there."""
    if checkpoint is None or checkpoint.progress.step < prepared.plan.num_updates:
        return False
    return all(file.is_file() for file in files_to_come(prepared.config, prepared.plan))


def check_identity(before: dict[str, Any], now: dict[str, Any], run_dir: Path) -> None:
    """Refuse to continue a run as another one.

    Raises:
        ConfigError: naming every setting and content that differs.
    """
    changes = difference(before, now)
    if changes:
        listed = "\n         ".join(changes)
        raise ConfigError(
            Problem(
                "this run directory holds a run with other settings",
                str(run_dir),
                f"changed since:\n         {listed}",
                "set the old values to resume it, give the new run another `name`, or start anew with --fresh",
            )
        )


def _batches(prepared: Prepared, cache: Cache, runtime: Runtime) -> BatchSource:
    config, plan = prepared.config, prepared.plan
    return BatchSource(
        prepared.dataset.records,
        prepared.dataset.samples(),
        cache.latents,
        cache.prompts,
        seed=config.seed,
        batch_size=plan.batch_size,
        accumulation=plan.accumulation,
        num_processes=plan.num_processes,
        caption_dropout=config.data.captions.dropout,
        device=runtime.device,
    )


def _write_run_files(prepared: Prepared, runtime: Runtime) -> None:
    """config.yaml, plan.json, environment.json: what this run is, for people and for a rerun."""
    atomicio.write_file(prepared.run_dir / "config.yaml", to_yaml(prepared.config).encode())
    atomicio.write_json(prepared.run_dir / "plan.json", prepared.plan.as_json() | {"identity": prepared.identity()})
    atomicio.write_json(prepared.run_dir / "environment.json", environment_report(runtime))


def _say_cache(cache: Cache, screen: Screen) -> None:
    if cache.num_cut_captions:
        screen.say(f"{cache.num_cut_captions} captions are longer than the text encoder reads and were cut")
    screen.say(f"cache: {cache.num_encoded} encoded now, {cache.latents.mean_NChw.shape[0]} latents in all")


def _due(step: int, period: int | None) -> bool:
    return period is not None and step % period == 0
