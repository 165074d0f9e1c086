"""Rows for `tests/fixes.py`: by source file, what its fixes mend; and those that no test here can apply.

A new `fix=` in `lora_trainer/x/y.py` needs a `Row` under "x/y.py" in one of the modules here: what makes it wrong
(overrides, or a function that changes the `World`) and what does as the fix says. One that cannot be applied here
stands in `NOT_HERE` with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fixes import Row

from fix_rows import commands, configuration, inputs, machine

ROWS: Mapping[str, Sequence[Row]] = {**configuration.ROWS, **commands.ROWS, **machine.ROWS, **inputs.ROWS}
FETCH, DOWNLOAD, OTHER_FAMILY = "fetch the base again", "the network", "a family that is not shipped"
ADVICE: Sequence[Row] = [*configuration.ADVICE, *inputs.ADVICE]
"""What is said to do in the middle of a message."""
NOT_HERE: Mapping[str, Mapping[str, str]] = {
    "cli/session.py": {
        "start it inside WSL2": "another machine",
        "unset PYTHONOPTIMIZE": "another start of Python",
        "the same command goes on": "test_signals does it, with a process of its own",
    },
    "cli/export.py": {
        "install it; the file says": "test_plugin exports where a plug-in is gone",
        "convert it with the tool that wrote it": "another program",
    },
    "experiments/lr_finder/run.py": {"start it again": "test_find_lr does it"},
    "runtime/launch.py": {"torchrun --nproc_per_node": "starts processes; test_launch does it"},
    "runtime/runtime.py": {
        "start with torchrun": "starts processes; test_launch does it",
        "its own last words": "starts processes and kills one; test_worlds does it",
    },
    "storage/checkpoint.py": {
        "lower optimizer.lr": "states that are not finite are skipped before; test_checkpoint makes one"
    },
    "data/cache.py": {"check the base's": "a base whose encoders overflow"},
    "lora_files/files.py": {
        "check the disk": "a disk that gives back what was not written",
        ".*": "weights beyond the range of the export's dtype: test_export makes them",
    },
    "models/diffusers_family.py": {FETCH: DOWNLOAD, "use sample.prompts": OTHER_FAMILY},
    "models/family.py": {"name the others too": OTHER_FAMILY},
    "models/folder.py": {
        "convert it once to a folder": DOWNLOAD,
        "add model.revision": DOWNLOAD,
        "check the name and your network": DOWNLOAD,
        "write model.prediction_type: auto": OTHER_FAMILY,
    },
    "models/registry.py": {"write auto": OTHER_FAMILY},
    "planning/prepare.py": {".*": "the fix of another file, with the name of the setting that it is about"},
    "planning/preflight.py": {"write objective.": OTHER_FAMILY},
    "config/optimizers.py": {
        "pip install": "the network; a test below compares its extra with pyproject.toml",
        "install or mend": "the network",
    },
}
"""By file: a piece of the text, and why it is not applied here."""
