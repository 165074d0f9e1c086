"""The shape of the code: imports go down, files and functions stay small, torch stays out where it must."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from house import LONGEST_CHAIN, MOST_LOOSE_MODULES, ROOF, ROOMS, House, floor, imported

ROOT = Path(__file__).parents[2]

HOUSE = House(ROOT)
TORCH_FREE = (
    "lora_trainer.cli.program",
    "lora_trainer.cli.train",
    "lora_trainer.cli.find_lr",
    "lora_trainer.data.records",
    "lora_trainer.planning.prepare",
    "lora_trainer.cli.report",
    "lora_trainer.evidence.diagnosis.diagnose",
    "lora_trainer.planning.run_plan",
    "lora_trainer.runtime.launch",
    "lora_trainer.evidence.statistics.verdict",
    "lora_trainer.config.load",
    "lora_trainer.schedules.registry",
)


def test_imports_go_down() -> None:
    assert len(HOUSE.modules) > 40
    assert HOUSE.imports_that_run_up() == []


def test_every_room_is_there_and_nothing_lies_outside() -> None:
    """`floor` refuses a module that lies in no room."""
    assert {floor(module) for module in HOUSE.modules} == set(range(len(ROOMS) + 1 + len(ROOF)))
    assert len(HOUSE.loose_modules) <= MOST_LOOSE_MODULES


def test_no_chain_of_imports_grows() -> None:
    chain = HOUSE.longest_chain()
    assert len(chain) <= LONGEST_CHAIN, " -> ".join(chain)


def test_no_function_takes_more_than_five_positional_parameters() -> None:
    assert HOUSE.long_parameter_lists() == []


def test_nothing_imports_the_contracts_of_plug_ins() -> None:
    importers = {
        name for name, targets in HOUSE.imports.items() if any(t.startswith("lora_trainer.testing") for t in targets)
    }
    assert {name for name in importers if not name.startswith("lora_trainer.testing")} == set()


@pytest.mark.process
def test_checking_and_planning_never_load_torch() -> None:
    code = (
        "import importlib, sys\n"
        f"for module in {TORCH_FREE!r}:\n"
        "    importlib.import_module(module)\n"
        "    assert 'torch' not in sys.modules, module"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_budgets() -> None:
    for module, tree in HOUSE.modules.items():
        assert HOUSE.sources[module].count("\n") <= 400, f"{module} has more than 400 lines"
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            limit = 120 if (module, node.name) == ("lora_trainer.training.fit", "fit") else 60
            assert length <= limit, f"{module}.{node.name} has {length} lines"


def test_nothing_unpickles_evaluates_or_starts_a_shell() -> None:
    forbidden = {"pickle", "marshal", "shelve", "dill", "joblib"}
    for module, tree in HOUSE.modules.items():
        assert not forbidden & set(imported(tree)), module
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "os.system"), f"{module}: {called}"
                assert not any(k.arg == "shell" for k in node.keywords), f"{module}: {called} with a shell"
                assert not any(k.arg == "trust_remote_code" for k in node.keywords), module


def test_no_module_outside_models_names_a_family() -> None:
    """Nor its parts; format 1 of checkpoints is from when there was one family."""
    words = re.compile(r"\b(unet|text_encoder|prompt_embeds)\b|stable_?diffusion|sd_v|sdxl", re.IGNORECASE)
    found, looked_at = set(), 0
    for module, tree in HOUSE.modules.items():
        if module.startswith("lora_trainer.models"):
            continue
        looked_at += 1
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            said = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "module", None) or ""
            if isinstance(node, ast.Constant) and id(node) not in docstrings:
                said = str(node.value)
            if words.search(said):
                found.add(f"{module}: {said}")
    assert looked_at > 80
    assert found == {"lora_trainer.training.resume: unet"}


def test_only_the_runtime_names_a_kind_of_device() -> None:
    kinds = ("cuda", "mps", "xpu", "empty_cache")
    found = set()
    for module, tree in HOUSE.modules.items():
        for node in ast.walk(tree):
            said = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)
            if isinstance(node, ast.Attribute | ast.Constant) and said in kinds:
                found.add(module)
    assert found
    assert all(module.startswith("lora_trainer.runtime.") for module in found), found
