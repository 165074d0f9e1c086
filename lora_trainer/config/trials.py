"""From one configuration with a `sweep` section to a checked configuration per trial. Never imports torch."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from lora_trainer.config.identity import identity_fields
from lora_trainer.config.load import check_source
from lora_trainer.config.places import cache_folder, run_directory
from lora_trainer.config.schema import RunConfig
from lora_trainer.config.source import KeyPath, Source, read_source, set_value, split_override
from lora_trainer.config.sweep_schema import RandomConfig
from lora_trainer.errors import ConfigError, Problem

RESERVED = {
    "name": "the sweep's name is its folder, and trials are named by what they override",
    "output_dir": "trials lie in the sweep's folder",
    "seed": "write sweep.seeds: each arm is trained with each",
    "sweep": "a trial has no trials of its own",
    "resume": "a trial's settings are its identity",
    "validation": "trials are compared on one probe",
    "train.precision": "trials are compared in one precision",
    "train.threads": "threads belong to the machine",
}
"""Keys that a trial cannot override, with the reason."""
LONGEST_NAME = 60
LR_KEY = "optimizer.lr"
_SAFE = re.compile(r"\w[\w.+-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class ArmConfig:
    """What is compared: overrides, and where each was written."""

    name: str
    overrides: Mapping[str, Any]
    places: Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class TrialConfig:
    """One arm with one seed; its setting is named after all that was overridden but the learning rate."""

    arm: str
    setting: str
    overrides: Mapping[str, Any]
    config: RunConfig

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def seed(self) -> int:
        return self.config.seed


def load_sweep(file: Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, list[TrialConfig]]:
    """The configuration of a sweep and those of its trials, all of them checked.

    Raises:
        ConfigError: with every problem of the configuration, or else of all trials.
    """
    source = read_source(file, overrides)
    config = check_source(source)
    assert config.sweep is not None
    arms, problems = _arms(config, source)
    seeds = config.sweep.seeds or (config.seed,)
    trials: list[TrialConfig] = []
    for seed, arm in itertools.product(seeds, arms):
        try:
            trial = check_source(_source_of(arm, seed, config, source))
            setting = arm_name({key: value for key, value in arm.overrides.items() if key != LR_KEY})
            trials.append(TrialConfig(arm.name, setting, arm.overrides, trial))
        except ConfigError as error:
            problems += [replace(p, what=f"trial `{arm.name}`: {p.what}") for p in error.problems]
    problems += _twins(trials)
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return config, trials


def _arms(config: RunConfig, source: Source) -> tuple[list[ArmConfig], list[Problem]]:
    """The arms of `trials`, `grid` and `random`; the config alone where there is none of them."""
    assert config.sweep is not None
    problems: list[Problem] = []
    arms = [*_named(config.sweep.trials, source, problems), *_grid(config.sweep.grid, source)]
    if config.sweep.random is not None:
        arms += _random(config.sweep.random, source, problems)
    problems += [
        Problem(f"trial `{arm.name}` cannot override `{key}`", arm.places[key], why, "remove it")
        for arm, (reserved, why) in itertools.product(arms, RESERVED.items())
        for key in arm.overrides
        if f"{key}.".startswith(f"{reserved}.")
    ]
    names = [arm.name for arm in arms]
    problems += [
        Problem(f"two arms would both be called `{name}`", source.place(("sweep",)), fix="rename or remove one")
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    return arms or ([] if problems else [ArmConfig(arm_name({}), {}, {})]), problems


def _named(
    trials: Mapping[str, list[str] | dict[str, Any]], source: Source, problems: list[Problem]
) -> Iterator[ArmConfig]:
    for name, written in trials.items():
        path: KeyPath = ("sweep", "trials", name)
        if not is_path_safe(name):
            rule = f"letters, digits, `_`, `-`, `.`, `+`, at most {LONGEST_NAME}"
            what = f"`{name}` becomes a folder's name: {rule}"
            problems.append(Problem(what, source.place(path), fix="rename the trial"))
            continue
        if isinstance(written, dict):
            yield ArmConfig(name, written, {key: source.place((*path, key)) for key in written})
            continue
        overrides, places = {}, {}
        for index, text in enumerate(written):
            place = source.place((*path, index))
            try:
                key, value = split_override(text, place)
                overrides[key], places[key] = value, place
            except ConfigError as error:
                problems += error.problems
        yield ArmConfig(name, overrides, places)


def _grid(grid: Mapping[str, Sequence[Any]], source: Source) -> Iterator[ArmConfig]:
    columns = [[(key, index, value) for index, value in enumerate(values)] for key, values in grid.items()]
    for chosen in itertools.product(*columns) if grid else ():
        overrides = {key: value for key, _, value in chosen}
        places = {key: source.place(("sweep", "grid", key, index)) for key, index, _ in chosen}
        yield ArmConfig(arm_name(overrides), overrides, places)


def _random(config: RandomConfig, source: Source, problems: list[Problem]) -> list[ArmConfig]:
    """Arm i depends on (seed, i, key) and on the arms drawn before it, each of which differs from the others."""
    places = {key: source.place(("sweep", "random", key)) for key in config.draws}
    for key, spec in config.draws.items():
        if (fault := _draw_fault(spec)) is not None:
            problems.append(Problem(f"`{key}`: {fault}", places[key], fix="as in {log_uniform: [1e-5, 1e-3]}"))
            return []
    drawn: dict[str, dict[str, Any]] = {}
    for index in range(1, config.num + 1):  # of n + 1 arms drawn alike, 100 (n + 1) draws miss one once in e^100 times
        attempts = (_draws(config, index, attempt) for attempt in range(100 * (len(drawn) + 1)))
        new = next((draws for draws in attempts if repr(draws) not in drawn), None)
        if new is None:
            what = f"`sweep.random` asks for {config.num} arms, and its draws allow {len(drawn)}"
            fix = f"write num: {len(drawn)}, or widen the draws"
            problems.append(Problem(what, source.place(("sweep", "random", "num")), fix=fix))
            return []
        drawn[repr(new)] = new
    return [ArmConfig(f"random{index}", overrides, places) for index, overrides in enumerate(drawn.values(), start=1)]


def _draws(config: RandomConfig, index: int, attempt: int) -> dict[str, Any]:
    again = f"|{attempt}" if attempt else ""
    streams = {key: random.Random(f"{config.seed}|{index}|{key}{again}") for key in config.draws}
    return {key: _draw(spec, streams[key]) for key, spec in config.draws.items()}


def _draw_fault(spec: Mapping[str, Sequence[Any]]) -> str | None:
    if len(spec) != 1 or next(iter(spec)) not in ("log_uniform", "uniform", "choice"):
        return f"one of log_uniform, uniform and choice is expected, not {', '.join(spec) or 'nothing'}"
    ((kind, values),) = spec.items()
    if kind == "choice":
        return None if values else "choice needs at least one value"
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(values) != 2 or len(numbers) != 2 or not numbers[0] < numbers[1]:
        return f"{kind} takes two numbers, the smaller one first"
    return "log_uniform takes numbers above 0" if kind == "log_uniform" and numbers[0] <= 0 else None


def _draw(spec: Mapping[str, Sequence[Any]], stream: random.Random) -> Any:
    """A value, numbers to four digits."""
    ((kind, values),) = spec.items()
    if kind == "choice":
        return stream.choice(list(values))
    low, high = values
    drawn = stream.uniform(low, high) if kind == "uniform" else math.exp(stream.uniform(math.log(low), math.log(high)))
    return float(f"{drawn:.4g}")


def _source_of(arm: ArmConfig, seed: int, config: RunConfig, source: Source) -> Source:
    """What the trial's own configuration file would say."""
    trial_source = Source(copy.deepcopy(source.data), dict(source.places))
    del trial_source.data["sweep"]
    for key, value in arm.overrides.items():
        set_value(trial_source, key, value, arm.places[key])
    placed = {
        "seed": seed,
        "name": f"{arm.name}-seed{seed}",
        "output_dir": str(run_directory(config) / "trials"),
        "data.cache_dir": str(cache_folder(config)),
    }
    for key, value in placed.items():
        set_value(trial_source, key, value, source.place(("sweep",)))
    return trial_source


def _twins(trials: Sequence[TrialConfig]) -> Iterator[Problem]:
    """Arms that say the same in other words."""
    seen: dict[str, str] = {}
    for trial in trials:
        identity = repr(identity_fields(trial.config))
        if identity in seen and seen[identity] != trial.arm:
            yield Problem(f"`{seen[identity]}` and `{trial.arm}` are the same trial", "sweep", fix="remove one of them")
        seen.setdefault(identity, trial.arm)


def arm_name(overrides: Mapping[str, Any]) -> str:
    """`cosine-warmup_steps5pct-lr3e-4`: the values in the order of the overrides, the learning rate last.

    A function of what was overridden, so that adding others renames none; safe as a folder's name.
    """
    ordered = sorted(overrides.items(), key=lambda entry: entry[0] == LR_KEY)
    text = "-".join(_entry(key, value) for key, value in ordered) or "base"
    if is_path_safe(text):
        return text
    digest = hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:6]
    safe = re.sub(r"[^\w.+-]+", "_", text, flags=re.ASCII).strip("_.-") or "arm"
    return f"{safe[: LONGEST_NAME - 7].rstrip('_.-')}-{digest}"


def is_path_safe(name: str) -> bool:
    return _SAFE.fullmatch(name) is not None and len(name) <= LONGEST_NAME


def _entry(key: str, value: Any) -> str:
    if isinstance(value, Mapping) and "type" in value:
        return "-".join([str(value["type"]), *(f"{k}{_value(v)}" for k, v in value.items() if k != "type")])
    return f"{key.rpartition('.')[2]}{_value(value)}"


def _value(value: Any) -> str:
    """The shortest text that is this value; of numbers 3e-4, 0.05, 16."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        exact = Decimal(repr(value)).normalize()
        return f"{exact:f}" if value == 0 or Decimal("0.01") <= abs(exact) < 10**6 else f"{exact:e}"
    return value.replace("%", "pct") if isinstance(value, str) else json.dumps(value, sort_keys=True)
