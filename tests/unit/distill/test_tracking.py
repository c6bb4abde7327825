"""W&B offline: what was tracked is read back from the run's own file; without tracking nothing is written."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from megatron_spd.distill.tracking import Tracker
from megatron_spd.errors import UserError
from megatron_spd.plan import BaseModel, SPDPlan
from tests.wandb_file import merged, read_offline_run


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run directory and the records of a tracker that was told everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_MODE", raising=False)
        run_dir = tmp_path_factory.mktemp("runs") / "myrun"
        plan = SPDPlan.dense(BaseModel("f", "llama", 2, 8, 2, 2, 8), 2).with_drops([0, 2])
        plan_path = run_dir.parent / "plan.json"
        plan.save(plan_path)
        tracker = Tracker("wandb", run_dir)
        tracker.config({"branches": 2, "loss": "mse", "data": {"tokens": 512}})
        for unit in ("0", "1-2"):
            for step in (1, 2, 3):
                tracker.curve(f"unit {unit}", step, loss=1.0 / step, lr=5e-5 * step)
            tracker.curve(f"unit {unit}", 3, held_out_loss=0.25)
        tracker.table("sensitivity", ["point", "sensitivity"], [[0, 41.4], [1, 9.0]])
        tracker.summary({"perplexity/plain": 27.2, "perplexity/final": 28.0})
        tracker.plan_artifact(plan_path)
        tracker.finish()
        tracker.finish()
    return run_dir, plan, read_offline_run(run_dir)


def test_config_and_names(recorded):
    run_dir, _, records = recorded
    updates = [r.run.config.update for r in records if r.HasField("run")]
    updates += [r.config.update for r in records if r.HasField("config")]
    config = merged([item for update in updates for item in update])
    assert config["branches"] == 2
    assert config["loss"] == "mse"
    assert config["data"] == {"tokens": 512}
    run = next(r.run for r in records if r.HasField("run"))
    assert (run.display_name, run.run_group, run.project) == ("myrun", run_dir.name, "megatron-spd")


def test_a_loss_curve_per_unit(recorded):
    rows = [merged(r.history.item) for r in recorded[2] if r.HasField("history")]
    for unit in ("0", "1-2"):
        curve = [row for row in rows if f"unit {unit}/loss" in row]
        assert [row[f"unit {unit}/step"] for row in curve] == [1, 2, 3]
        assert [row[f"unit {unit}/loss"] for row in curve] == pytest.approx([1, 1 / 2, 1 / 3])
        assert [row[f"unit {unit}/lr"] for row in curve] == pytest.approx([5e-5, 1e-4, 1.5e-4])
        judged = [row for row in rows if f"unit {unit}/held_out_loss" in row]
        assert [(row[f"unit {unit}/step"], row[f"unit {unit}/held_out_loss"]) for row in judged] == [
            (3, 0.25)
        ]
    axes = {r.metric.name: r.metric.step_metric for r in recorded[2] if r.HasField("metric")}
    assert axes["unit 1-2/loss"] == axes["unit 1-2/held_out_loss"] == "unit 1-2/step"


def test_table(recorded):
    run_dir = recorded[0]
    (path,) = run_dir.glob("wandb/offline-run-*/files/media/table/sensitivity_*.table.json")
    table = json.loads(path.read_text())
    assert table["columns"] == ["point", "sensitivity"]
    assert table["data"] == [[0, 41.4], [1, 9.0]]


def test_summary(recorded):
    summary = merged([item for r in recorded[2] if r.HasField("summary") for item in r.summary.update])
    assert summary["perplexity/plain"] == 27.2
    assert summary["perplexity/final"] == 28.0


def test_the_plan_is_an_artifact(recorded):
    _, plan, records = recorded
    logged = [r.request.log_artifact.artifact for r in records if r.request.HasField("log_artifact")]
    logged += [r.artifact for r in records if r.HasField("artifact")]
    (artifact,) = [a for a in logged if a.type == "plan"]
    (entry,) = artifact.manifest.contents
    assert entry.path == "plan.json"
    assert SPDPlan.load(entry.local_path) == plan


def test_without_tracking_nothing_is_written(tmp_path):
    for tracker in (Tracker("none", tmp_path / "run"), Tracker("wandb", tmp_path / "run", is_main=False)):
        with tracker:
            tracker.config({"a": 1})
            tracker.curve("unit 3", 1, loss=0.5, lr=1e-5)
            tracker.table("t", ["a"], [[1]])
            tracker.summary({"a": 1})
            tracker.plan_artifact(tmp_path / "missing.json")
    assert list(tmp_path.iterdir()) == []


def test_wandb_is_not_imported_before_it_is_needed():
    code = (
        "import sys, pathlib; from megatron_spd.distill.tracking import Tracker;"
        "Tracker('none', pathlib.Path('unused')).finish(); print('wandb' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_bad_settings(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"tracking 'tensorboard'; expected one of .*wandb.*none"):
        Tracker("tensorboard", tmp_path)
    monkeypatch.setenv("WANDB_MODE", "on")
    with pytest.raises(UserError, match=r"WANDB_MODE is 'on'; expected one of .*offline"):
        Tracker("wandb", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_plan_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with (
        Tracker("wandb", tmp_path / "run") as tracker,
        pytest.raises(UserError, match=r"no plan at .*gone\.json"),
    ):
        tracker.plan_artifact(tmp_path / "gone.json")


def test_online_without_a_login_is_one_line(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    with pytest.raises(
        UserError, match=r"W&B could not start: .*WANDB_MODE=offline.*--tracking none"
    ) as caught:
        Tracker("wandb", tmp_path / "run")
    assert "\n" not in str(caught.value)
