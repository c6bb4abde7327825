"""W&B offline: what was tracked is read back from the run's own file; without tracking nothing is written."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time

import pytest

from megatron_spd.distill.tracking import Tracker
from megatron_spd.errors import UserError
from megatron_spd.plan import BaseModel, SPDPlan

FILE_HEADER = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
BLOCK, FULL, FIRST, LAST = 32768, 1, 2, 4


def messages(data):
    """The whole messages in a W&B file that may still grow.

    It is LevelDB's log format, which wandb writes but has no Python reader for: blocks of 32 KiB hold fragments
    with a header of checksum, length and kind (whole, first, middle, last).
    """
    assert data[:7] == FILE_HEADER[: len(data)]
    place, message = len(FILE_HEADER), b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        fragment = data[place + 7 : place + 7 + length]
        if len(fragment) < length:
            return
        place += 7 + length
        message = fragment if kind in (FULL, FIRST) else message + fragment
        if kind in (FULL, LAST):
            yield message


def read_offline_run(run_dir):
    """Every record of the one offline run below ``run_dir``.

    W&B's service process may still be writing when ``finish`` returns; a finished run ends with an exit record.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    give_up = time.monotonic() + 60
    while True:
        records = [Record.FromString(message) for message in messages(path.read_bytes())]
        if records and records[-1].HasField("exit"):
            return records
        assert time.monotonic() < give_up, "the run was never written to its end"
        time.sleep(0.05)


def merged(items):
    """key -> value of W&B's update items, later ones winning."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


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
                tracker.unit_loss(unit, step, loss=1.0 / step, lr=5e-5 * step)
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
    axes = {r.metric.name: r.metric.step_metric for r in recorded[2] if r.HasField("metric")}
    assert axes["unit 1-2/loss"] == "unit 1-2/step"


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
            tracker.unit_loss(3, 1, 0.5, 1e-5)
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
