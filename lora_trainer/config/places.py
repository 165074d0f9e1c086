"""Where a run writes, and what its files are called."""

from __future__ import annotations

from pathlib import Path

from lora_trainer.config.schema import RunConfig

CONFIG_FILE, PLAN_FILE, ENVIRONMENT_FILE, EXIT_FILE = "config.yaml", "plan.json", "environment.json", "exit.json"
METRICS_FILE, VALIDATION_FILE = "metrics.jsonl", "validation.json"
CURVES_FILE, REPORT_FILE, GRID_FILE = "curves.png", "report.html", "grid.png"
CHECKPOINTS, SAMPLES = "checkpoints", "samples"
TRIALS, GROUPS = "trials", "groups"
"""Folders of a sweep: one folder a trial, one with the checkpoints of each group."""


def run_directory(config: RunConfig) -> Path:
    """`<output_dir>/<name>`."""
    return Path(config.output_dir).expanduser() / config.name


def cache_folder(config: RunConfig) -> Path:
    """`data.cache_dir`, by default `<output_dir>/.cache`."""
    return Path(config.data.cache_dir or Path(config.output_dir) / ".cache").expanduser()


def lora_file(config: RunConfig, step: int | None = None) -> Path:
    """The LoRA in kohya's layout: the final one, or a numbered one."""
    numbered = config.name if step is None else f"{config.name}-step{step:08d}"
    return run_directory(config) / f"{numbered}.safetensors"


def best_lora_file(config: RunConfig) -> Path:
    """The LoRA with the smallest held-out loss."""
    return run_directory(config) / f"{config.name}-best.safetensors"


def diffusers_lora_file(config: RunConfig) -> Path:
    """The LoRA in diffusers' layout."""
    return run_directory(config) / "diffusers" / "pytorch_lora_weights.safetensors"


def report_file(config: RunConfig) -> Path:
    """The page about the run."""
    return run_directory(config) / REPORT_FILE
