"""Does a sweep that is killed lose or repeat anything? Six schedules x three LRs x five seeds, SIGKILL at random times.

    python tests/stress/torture_sweep.py [--kills 15]     # a quarter of an hour on one core; resumes

Trains 90 trials on the toy base of the tests twice: once straight, once killed again and again. Then it asks: are LoRA
files, logs and results equal, was any trial of a finished group touched again, and is the report the same when it is
made from records and logs alone? Writes benchmarks/results/torture_sweep.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lora_trainer.errors import ExitCode
from lora_trainer.report.page import write_report
from lora_trainer.storage import atomic_files
from lora_trainer.tracking.console import MainConsole
from lora_trainer.tracking.metrics import TIMING_FIELDS, read_rows

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "torture-sweep"
RESULT = ROOT / "benchmarks" / "results" / "torture_sweep.json"
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
LRS, SEEDS = (1e-4, 1e-3, 1e-2), (1, 2, 3, 4, 5)
MOST_ROWS = 300
"""Log rows that a start may write before its kill: of 216 in a group, so that it may fall into the next one."""
NOT_COMPARED = ("resume", "checkpoint")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    console = MainConsole()
    make_world()
    console.print("the straight sweep ...")
    straight, killed = finish("straight"), WORK / "runs" / "killed"
    kills = torment(killed, options.kills, console)
    content = {
        "command": "python tests/stress/torture_sweep.py",
        "environment": json.loads(next(straight.glob("trials/*/environment.json")).read_text()),
        "trials": len(results(straight)),
        "kills": len(kills),
        "groups_finished_before_the_last_kill": kills[-1]["finished_groups"],
        "trials_touched_again_after_their_group_was_finished": sum(kill["touched_again"] for kill in kills),
        "trials_with_other_lora_bytes": differing(straight, killed, lora_bytes),
        "trials_with_another_log": differing(straight, killed, log_rows),
        "same_results": results(straight) == results(killed),
        "report_from_records_and_logs_alone_is_the_same": report_alone(straight),
    }
    atomic_files.write_json(options.output, content)
    console.table("sweep", [(key, str(value)) for key, value in content.items() if key != "environment"])


def make_world() -> None:
    """The toy base and its images, once."""
    if (WORK / "config.yaml").exists():
        return
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import TOY_CONFIG
    from toys import build_toy_base, write_images

    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    base, images = build_toy_base(WORK / "base"), write_images(WORK / "images")
    text = TOY_CONFIG.format(output=WORK / "runs", base=base, images=images)
    atomic_files.write_file(WORK / "config.yaml", text.encode())


def start(name: str) -> subprocess.Popen[bytes]:
    """The sweep in a process of its own; the same call resumes."""
    schedules = [{"type": each, **({"warmup_steps": 2} if "warmup" in each else {})} for each in SCHEDULES]
    grid = json.dumps({"lr_scheduler": schedules, "optimizer.lr": LRS})
    words = [
        f"name={name}",
        "train.max_steps=12",
        "checkpoint.every_steps=3",
        "validation={fraction: 0.34, every_steps: 6, max_cost: 1.0}",
        f"sweep={{grid: {grid}, seeds: {list(SEEDS)}, trials_per_pass: 6}}",
    ]
    command = [sys.executable, "-m", "lora_trainer", "sweep", "--config", str(WORK / "config.yaml"), *words]
    with (WORK / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(name: str) -> Path:
    """Run a sweep to its end; its directory."""
    if (code := start(name).wait()) != ExitCode.DONE:
        raise SystemExit(f"the sweep {name} ended with {code}: see {WORK / name}.log")
    return WORK / "runs" / name


def torment(sweep_dir: Path, count: int, console: MainConsole) -> list[dict[str, int]]:
    """Kill the sweep `count` times at random, then let it finish; what each kill left and what starts touched."""
    record = WORK / "kills.jsonl"
    kills = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    for index in console.track(range(len(kills), count), "kills", count - len(kills)):
        before = finished_files(sweep_dir)
        enough = num_rows(sweep_dir) + random.Random(f"sweep {index}").randint(-MOST_ROWS // 5, MOST_ROWS)
        process = start(sweep_dir.name)
        while process.poll() is None and num_rows(sweep_dir) < enough:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills.append({"finished_groups": groups_done(sweep_dir), "touched_again": touched(before)})
        with record.open("a") as file:
            file.write(json.dumps(kills[-1]) + "\n")
    before = finished_files(sweep_dir)
    finish(sweep_dir.name)
    kills[-1]["touched_again"] += touched(before)
    return kills


def num_rows(sweep_dir: Path) -> int:
    """Rows in the logs of all trials."""
    return sum(file.read_bytes().count(b"\n") for file in sweep_dir.glob("trials/*/metrics.jsonl"))


def finished_files(sweep_dir: Path) -> dict[Path, int]:
    """The time of every file of the trials whose group is finished."""
    content = read(sweep_dir)
    done = {group["name"] for group in content["groups"] if group["status"] == "finished"}
    folders = [sweep_dir / trial["folder"] for trial in content["trials"] if trial["group"] in done]
    return {file: file.stat().st_mtime_ns for folder in folders for file in folder.rglob("*") if file.is_file()}


def touched(before: dict[Path, int]) -> int:
    return len({file.parent for file, time_ns in before.items() if file.stat().st_mtime_ns != time_ns})


def groups_done(sweep_dir: Path) -> int:
    return sum(group["status"] == "finished" for group in read(sweep_dir)["groups"])


def read(sweep_dir: Path) -> dict[str, Any]:
    file = sweep_dir / "sweep.json"
    return json.loads(file.read_text()) if file.exists() else {"groups": [], "trials": []}


def results(sweep_dir: Path) -> dict[str, Any]:
    return {trial["name"]: trial for trial in read(sweep_dir)["trials"]}


def differing(one: Path, other: Path, what: Any) -> int:
    """Trials of which `what` is not the same in both sweeps."""
    names = sorted(results(one))
    assert len(names) == len(SCHEDULES) * len(LRS) * len(SEEDS)
    return sum(what(one / "trials" / name) != what(other / "trials" / name) for name in names)


def lora_bytes(folder: Path) -> dict[str, bytes]:
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")}
    assert len(found) == 3, f"{folder} has {sorted(found)}"
    return found


def log_rows(folder: Path) -> list[dict[str, Any]]:
    rows = (row for row in read_rows(folder / "metrics.jsonl") if row.get("event") not in NOT_COMPARED)
    return [{key: value for key, value in row.items() if key not in TIMING_FIELDS} for row in rows]


def report_alone(sweep_dir: Path) -> bool:
    """Whether the page can be made again without any LoRA file or checkpoint."""
    bare = WORK / "bare" / sweep_dir.name
    shutil.rmtree(bare, ignore_errors=True)
    shutil.copytree(sweep_dir, bare, ignore=shutil.ignore_patterns("*.safetensors", "checkpoints", "report.html"))
    write_report([bare], bare / "report.html")
    return (bare / "report.html").read_bytes() == (sweep_dir / "report.html").read_bytes()


if __name__ == "__main__":
    main()
