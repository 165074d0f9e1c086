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
fit(TrialGroup.from_json(Path(sys.argv[1]).read_bytes()), console=MainConsole(silent=True))
"""


def silent(items: Any, _: str, __: int) -> Any:
    return items


def swept(config: Path) -> TrialGroup:
    loaded, trials = load_sweep(config, [WATCHED, SECTION, "train.ema_decay=null"])
    (group,) = prepare_sweep(loaded, trials, Launch(), silent).groups
    assert [member.prefix is not None for member in group.members] == [False, True, False]
    return group


def alone(config: Path) -> TrialGroup:
    overrides = [WATCHED, GROUPS, "train.ema_decay=0.9", "sample={prompts: [x], num_inference_steps: 1}"]
    return solo_group(prepare(load_config(config, overrides), Launch(), silent))


def loras(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("make", [swept, alone])
def test_another_process_trains_a_written_group_to_the_same_bytes(
    make: Callable[[Path], TrialGroup], toy_config: Path, tmp_path: Path, program: Callable[..., Any]
) -> None:
    group = make(toy_config)
    file = tmp_path / "group.json"
    file.write_bytes(group.to_json())
    assert TrialGroup.from_json(file.read_bytes()) == group
    run_dir = tmp_path / "runs" / "toy"
    ended = program([sys.executable, "-c", TRAIN, str(file)])
    assert ended.returncode == 0, ended.stderr
    written = loras(run_dir)
    assert len(written) >= 4
    run_dir.rename(run_dir.with_name("written"))
    fit(group, console=MainConsole(silent=True))
    assert loras(run_dir) == written
