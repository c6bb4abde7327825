"""Imports go one way, frameworks stay in their places, and importing does nothing else."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_spd"

#: From the bottom up: a part imports from lower levels; from its own level only without going round in a circle.
LEVELS: list[set[str]] = [
    {"errors", "files"},
    {"collective", "plan", "options", "config", "parsing", "runtime", "progress"},
    {"comm"},
    {"layers"},
    {"models"},
    {"checkpoint", "calibration"},
    {"sensitivity", "grouping", "distill", "evaluate", "latency", "serving"},
    {"report", "stages", "compensation", "planning", "optimizing", "converting", "exchange", "run_folder"},
    {"pipeline", "curve", "curve_variants", "commands", "scale", "finetune"},
    {"cli"},
]
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}

#: Who may import a framework.
PLACES: dict[str, set[str]] = {
    "deepspeed": {"runtime", "distill", "finetune"},
    "megatron": {
        "runtime",
        "layers",
        "models",
        "checkpoint",
        "calibration",
        "distill",
        "evaluate",
        "latency",
        "finetune",
    },
    "wandb": {"distill"},
    "lm_eval": {"evaluate"},
    "datasets": {"evaluate"},
    "matplotlib": {"report"},
    "vllm": {"serving"},
    "torch": set(LEVEL) - {"errors", "files", "collective", "plan", "options", "config", "parsing", "cli"},
}


def modules() -> dict[str, Path]:
    """Every module of the package, by its name below ``megatron_spd``."""
    files = [p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"]
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in files}


def part_of(module: str) -> str:
    """The part in LEVELS that ``module`` belongs to."""
    return module.split(".")[0]


def imports(path: Path, module: str) -> Iterator[str]:
    """Absolute names that a file imports, in functions too; not those for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    only_types = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if node in only_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = ["megatron_spd", *module.split(".")][: -node.level]
                base = ".".join([*parents, *filter(None, [base])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def own_imports() -> dict[str, set[str]]:
    """For every module the modules of this package that it imports."""
    known = modules()
    found = {
        name: {i.removeprefix("megatron_spd.") for i in imports(path, name)} for name, path in known.items()
    }
    return {name: (names & known.keys()) - {name} for name, names in found.items()}


def test_the_reader_of_imports_sees_them(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "import os, torch.nn\nfrom megatron_spd import plan\nif TYPE_CHECKING:\n    import wandb\n"
        "def f():\n    from . import units\n    from ..comm.autograd import copy\n"
    )
    assert {
        "torch.nn",
        "megatron_spd.plan",
        "megatron_spd.distill.units",
        "megatron_spd.comm.autograd",
    } <= set(imports(file, "distill.module"))
    assert "wandb" not in set(imports(file, "distill.module"))


def test_every_part_has_its_place() -> None:
    assert {part_of(m) for m in modules()} <= LEVEL.keys()


def test_imports_go_one_way() -> None:
    upward = [
        f"{module} imports {other}"
        for module, others in own_imports().items()
        for other in others
        if LEVEL[part_of(other)] > LEVEL[part_of(module)]
    ]
    assert not upward


def test_parts_of_one_level_do_not_go_round_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module, others in own_imports().items():
        part = part_of(module)
        graph.setdefault(part, set()).update(part_of(other) for other in others)
    # A part may import itself; its modules must still come in some order.
    graphlib.TopologicalSorter({part: others - {part} for part, others in graph.items()}).prepare()
    graphlib.TopologicalSorter(own_imports()).prepare()


@pytest.mark.parametrize("framework", PLACES)
def test_frameworks_stay_in_their_places(framework: str) -> None:
    outside = [
        module
        for module, path in modules().items()
        if any(name.split(".")[0] == framework for name in imports(path, module))
        and part_of(module) not in PLACES[framework]
    ]
    assert not outside


def test_the_exported_modelling_files_need_only_torch_and_transformers() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "transformers"}
    for module, path in modules().items():
        if module.startswith("checkpoint.remote_code."):
            foreign = {name for name in imports(path, module) if name.split(".")[0] not in allowed}
            assert all(name.startswith("megatron_spd.checkpoint.remote_code") for name in foreign), foreign


def test_importing_has_no_side_effects(tmp_path: Path) -> None:
    """Every module is imported in a fresh process: nothing joined, replaced, seeded, printed or written."""
    # vLLM changes the process that imports it; the modules on top of it are read for its import alone.
    names = [f"megatron_spd.{name}" for name in modules() if not name.startswith("serving.vllm.")]
    code = f"""
import importlib, os, torch, torch.distributed as dist
state, device, dtype = torch.get_rng_state(), torch.cuda.current_device, torch.get_default_dtype()
for name in {names!r}:
    importlib.import_module(name)
from megatron.core import parallel_state
assert not dist.is_initialized() and not parallel_state.model_parallel_is_initialized()
assert torch.equal(state, torch.get_rng_state())
assert torch.cuda.current_device is device and torch.get_default_dtype() is dtype
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())
