"""A group is plain data: written to JSON, it is trained by another process to the same bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toys import WATCHED

from lora_trainer.config.load import load_config
from lora_trainer.config.trials import load_sweep
from lora_trainer.experiments.sweep.prepare import prepare_sweep
from lora_trainer.planning.prepare import prepare
from lora_trainer.runtime.launch import Launch
from lora_trainer.tracking.console import MainConsole
from lora_trainer.training.fit import fit
from lora_trainer.training.group import TrialGroup, solo_group

SECTION = (
    "sweep={trials: {slow: {lr_scheduler: {type: constant_with_warmup, warmup_steps: 3}},"
    " slower: {lr_scheduler: {type: constant_with_warmup, warmup_steps: 4}},"
    " free: {optimizer: {type: schedule_free_adamw, lr: 1e-3, betas: [0.8, 0.99]}, lr_scheduler: {type: constant}}},"
    " trials_per_pass: 2, prune: {diverged: 3.0}}"
)
GROUPS = "optimizer.groups=[{name: up, match: ['up_blocks.*.to_q'], lr: 5e-4, lr_scheduler: {type: rex}}]"
TRAIN = """
import sys
from pathlib import Path
from lora_trainer.tracking.console import MainConsole
from lora_trainer.training.fit import fit
from lora_trainer.training.group import TrialGroup
for file in sys.argv[1:]:
    fit(TrialGroup.from_json(Path(file).read_bytes()), console=MainConsole(silent=True))
"""


def silent(items: Any, _: str, __: int) -> Any:
    return items


def swept(config: Path, output: Path) -> TrialGroup:
    loaded, trials = load_sweep(config, [f"output_dir={output}", WATCHED, SECTION, "train.ema_decay=null"])
    (group,) = prepare_sweep(loaded, trials, Launch(), silent).groups
    assert [member.prefix is not None for member in group.members] == [False, True, False]
    return group


def alone(config: Path, output: Path) -> TrialGroup:
    overrides = [WATCHED, GROUPS, "train.ema_decay=0.9", "sample={prompts: [x], num_inference_steps: 1}"]
    return solo_group(prepare(load_config(config, [f"output_dir={output}", *overrides]), Launch(), silent))


def loras(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")}


@pytest.mark.process
def test_another_process_trains_written_groups_to_the_same_bytes(
    toy_config: Path, tmp_path: Path, program: Callable[..., Any]
) -> None:
    groups = {make.__name__: make(toy_config, tmp_path / make.__name__) for make in (swept, alone)}
    files = {name: tmp_path / f"{name}.json" for name in groups}
    for name, group in groups.items():
        files[name].write_bytes(group.to_json())
        assert TrialGroup.from_json(files[name].read_bytes()) == group
    ended = program([sys.executable, "-c", TRAIN, *map(str, files.values())])
    assert ended.returncode == 0, ended.stderr
    for name, group in groups.items():
        run_dir = tmp_path / name / "toy"
        written = loras(run_dir)
        assert len(written) >= 4
        run_dir.rename(run_dir.with_name("written"))
        fit(group, console=MainConsole(silent=True))
        assert loras(run_dir) == written
