"""Train with two commits on one machine and compare: whoever changes the loop shows what became of the numbers.

python tests/compare_commits.py BEFORE [AFTER]   # AFTER: HEAD; 15 minutes on two cores

| case | must be |
|---|---|
| the LoRA of scripts/demo | equal bytes |
| the trials of a sweep, one per pass | equal bytes |
| a run stopped and resumed by each commit, and begun by one and ended by the other | equal bytes |
| the trials of a sweep, packed | each tensor within 1e-3 of its norm |
| find-lr | the same suggestion |

Both use this interpreter's packages and the configurations of BEFORE.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
SHORT = ("train.max_steps=40", "sample={}", "tracking.tensorboard=false")
SWEEP = (
    "sweep={grid: {lr_scheduler: [{type: cosine}, {type: constant}], optimizer.lr: [1e-3, 3e-3]}, trials_per_pass: %s}"
)
PACKED_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Tree:
    """One commit, checked out."""

    path: Path

    def start(self, verb: str, config: Path, *words: str) -> subprocess.Popen[str]:
        """A verb of the program in a process of its own."""
        command = [sys.executable, "-m", "lora_trainer", verb, "--config", str(config), *words]
        environment = os.environ | {"PYTHONPATH": str(self.path), "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(
            command, cwd=self.path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def run(self, verb: str, config: Path, *words: str) -> str:
        """The same to its end; what it printed."""
        process = self.start(verb, config, *words)
        printed, _ = process.communicate()
        if process.returncode:
            sys.exit(f"{self.path}: {verb} {' '.join(words)} ended with {process.returncode}\n{printed}")
        return printed

    def stop_and_resume(self, config: Path, words: Sequence[str], run_dir: Path, resumed_by: Tree) -> None:
        """Train until there is a log, stop, and let a tree go on."""
        process = self.start("train", config, *words)
        log = run_dir / "metrics.jsonl"
        while process.poll() is None and not (log.exists() and log.read_bytes().count(b'"loss"') >= 10):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        if process.wait() != 75:
            sys.exit(f"{self.path}: the run ended with {process.returncode} before it was stopped")
        resumed_by.run("train", config, *words)


def lora_files(folder: Path) -> dict[str, Path]:
    """Every LoRA under a folder by its path in there."""
    files = sorted(folder.rglob("*.safetensors"))
    return {str(f.relative_to(folder)): f for f in files if not {".cache", "checkpoints"} & set(f.parts)}


def differing(before: Path, after: Path) -> list[str]:
    """The LoRA files that are not the same bytes in both folders, or in one alone."""
    ours, theirs = lora_files(before), lora_files(after)
    if not ours:
        sys.exit(f"no LoRA under {before}")
    same = {name for name in ours.keys() & theirs if ours[name].read_bytes() == theirs[name].read_bytes()}
    return sorted((ours.keys() | theirs.keys()) - same)


def largest_difference(before: Path, after: Path) -> float:
    """Over all tensors of all LoRA files: |a - b| / |b|."""
    ours, theirs = lora_files(before), lora_files(after)
    assert ours
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for name, file in ours.items():
        reference, tensors = load_file(file), load_file(theirs[name])
        for key, tensor in reference.items():
            distance = torch.linalg.vector_norm(tensors[key].double() - tensor.double())
            worst = max(worst, float(distance / torch.linalg.vector_norm(tensor.double()).clamp(min=1e-30)))
    return worst


def compare(before: Tree, after: Tree, work: Path) -> Iterator[tuple[str, str, bool]]:
    """Each case, what came of it, and whether that is as it must be."""
    demo, sweep = (before.path / "configs" / name for name in ("demo.yaml", "demo_sweep.yaml"))

    def both(name: str, verb: str, config: Path, *words: str) -> tuple[Path, Path]:
        folders = work / "before" / name, work / "after" / name
        for tree, folder in zip((before, after), folders, strict=True):
            print(f"{name}: {tree.path.name} ...", flush=True)
            tree.run(verb, config, f"output_dir={folder}", *words)
        return folders

    def equal(name: str, folders: tuple[Path, Path]) -> tuple[str, str, bool]:
        wrong = differing(*folders)
        what = f"{len(lora_files(folders[0]))} files equal" if not wrong else f"differ: {', '.join(wrong)}"
        return name, what, not wrong

    yield equal("demo", both("demo", "train", demo))
    yield equal("sweep, one per pass", both("sweep", "sweep", sweep, *SHORT, SWEEP % 1))
    packed = largest_difference(*both("packed", "sweep", sweep, *SHORT, SWEEP % 4))
    yield "sweep, packed", f"largest |a - b| / |b| of a tensor: {packed:.1e}", packed <= PACKED_TOLERANCE

    straight = work / "before" / "straight"
    before.run("train", demo, f"output_dir={straight}", *SHORT)
    for one, other in ((before, before), (after, after), (before, after)):
        name = f"resumed, {one.path.name} then {other.path.name}"
        print(f"{name} ...", flush=True)
        folder = work / name.replace(", ", "-").replace(" ", "-")
        one.stop_and_resume(demo, [f"output_dir={folder}", *SHORT], folder / "demo", other)
        yield equal(name, (straight, folder))

    answers = []
    for folder in both("find-lr", "find-lr", sweep):
        (file,) = folder.rglob("find_lr.json")
        answers.append(json.loads(file.read_text())["lr"])
    yield "find-lr", f"{answers[0]:.3e} and {answers[1]:.3e}", answers[0] == answers[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after", nargs="?", default="HEAD")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="compare-commits-") as folder:
        work = Path(folder)
        trees = []
        for name in ("before", "after"):
            tree = Tree(work / "trees" / name)
            subprocess.run(
                ["git", "worktree", "add", "--detach", str(tree.path), getattr(asked, name)], cwd=ROOT, check=True
            )
            trees.append(tree)
        try:
            all_good = True
            for name, what, good in compare(*trees, work):
                print(f"{'as it must be' if good else 'WRONG':14} {name:34} {what}", flush=True)
                all_good &= good
        finally:
            for tree in trees:
                subprocess.run(["git", "worktree", "remove", "--force", str(tree.path)], cwd=ROOT, check=True)
    return int(not all_good)


if __name__ == "__main__":
    sys.exit(main())
