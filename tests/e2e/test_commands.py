"""The whole chain on a tiny random model, through the command line."""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.checkpoint.remote_code.modeling_spd import SPDLlamaForCausalLM
from megatron_spd.plan import SPDPlan
from tests.command_line import answer, command, files
from tests.models import make_llama, tiny_text, tiny_tokenizer
from tests.wandb_file import merged, read_offline_run

ROOT = Path(__file__).parents[2]
LAYERS, BRANCHES = 4, 2
SEQUENCES, LENGTH = 4, 16
#: Tiers by these thresholds (a random model's perplexities are huge): the worst block is grouped, the others
#: distilled.
TAU2 = 8_000_000
TIERS = ["--tau1", -1_000_000_000, "--tau2", TAU2]
#: What the paper does: attention points, tiers, published head grouping, no search over sets.
PAPER = ["--sync-points", "attention", "--recovery", "paper"]
TRAINING = ["--epochs", 2, "--micro-batch-size", 1, "--learning-rate", 1e-3]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model ``model``, as `prepare` makes it, and the text ``text``."""
    folder = tmp_path_factory.mktemp("work")
    make_llama(folder / "downloaded", heads=4, kv=4, layers=LAYERS, max_shard_size="20KB")
    (folder / "text").write_text(tiny_text(), encoding="utf-8")
    result = answer("prepare", "--model", folder / "downloaded", "--out", folder / "model")
    assert result["reused"] is False
    return folder


def data(work: Path) -> list[object]:
    return ["--data", work / "text", "--sequences", SEQUENCES, "--seq-length", LENGTH]


def run_arguments(work: Path, out: Path, *more: object) -> list[object]:
    """`run` with three of the four attention points dropped, all three distilled and one of them grouped."""
    evaluation = ["--eval-sequences", 4, "--distill-sequences", 8]
    fixed = ["run", "--model", work / "model", "--out", out, "--branches", BRANCHES, *data(work), *evaluation]
    return [*fixed, "--drop-ratio", 0.7, *TIERS, *TRAINING, *PAPER, *more]


@pytest.fixture(scope="module")
def chain(work: Path) -> dict[str, dict[str, Any]]:
    """The answers of the commands, one after the other, by name; their files lie in ``work``."""
    model = ["--model", work / "model"]
    sensitivity = ["sensitivity", *model, "--branches", BRANCHES, "--out", work / "s.json", *data(work)]
    chosen = ["--sensitivity", work / "s.json", "--branches", BRANCHES, "--drop-ratio", 0.7, *TIERS, *PAPER]
    trained = ["--plan", work / "grouped.json", *data(work), *TRAINING, "--tracking", "none"]
    exported = ["--plan", work / "grouped.json", "--distilled", work / "distilled", "--out", work / "spd"]
    return {
        "sensitivity": answer(*sensitivity),
        "plan": answer("plan", *model, *chosen, "--out", work / "plan.json"),
        "group": answer(
            "group", *model, "--plan", work / "plan.json", "--out", work / "grouped.json", *data(work)
        ),
        "distill": answer("distill", *model, *trained, "--out", work / "distilled"),
        "export": answer("export", *model, *exported),
    }


@pytest.fixture(scope="module")
def one_rank(work: Path) -> dict[str, Any]:
    """The answer of `run` on one rank, tracked by W&B; its folder is ``work/run``."""
    return answer(*run_arguments(work, work / "run"))


def pieces(work: Path, skip: int = 0, sequences: int = SEQUENCES) -> Tensor:
    """Contiguous pieces of the text from its start, no special tokens: [sequences, LENGTH]."""
    ids = tiny_tokenizer()((work / "text").read_text(), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[skip * LENGTH : (skip + sequences) * LENGTH]).view(sequences, LENGTH)


@torch.no_grad()
def reference_perplexity(model: LlamaForCausalLM, tokens: Tensor) -> float:
    """Each piece scored on its own from its second token, by transformers' own loss (a mean over equally many)."""
    return math.exp(torch.stack([model(t[None], labels=t[None]).loss.double() for t in tokens]).mean())


def test_prepare_again_does_nothing(work: Path) -> None:
    before = files(work / "model")
    result = answer("prepare", "--model", work / "downloaded", "--out", work / "model")
    assert (result["reused"], result["family"]) == (True, "llama")
    assert files(work / "model") == before


def test_perplexity_of_a_plain_model_is_transformers_own(work: Path) -> None:
    result = answer("evaluate", "--model", work / "model", *data(work))
    expected = reference_perplexity(LlamaForCausalLM.from_pretrained(work / "model"), pieces(work))
    assert result["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert result["tokens"] == SEQUENCES * (LENGTH - 1)


def test_sensitivity(work: Path, chain: dict[str, dict[str, Any]]) -> None:
    result = chain["sensitivity"]
    written = json.loads((work / "s.json").read_text())
    assert {k: v for k, v in result.items() if k not in ("out", "plot")} == written
    assert [e["block"] for e in written["algorithm1"]] == list(range(LAYERS))
    assert [e["point"] for e in written["single"]] == list(range(2 * LAYERS - 1))
    assert (work / "s.png").read_bytes().startswith(b"\x89PNG")
    # The last block alone is both Algorithm 1's first step and a single point.
    assert written["algorithm1"][-1]["perplexity"] == pytest.approx(
        written["single"][-1]["perplexity"], rel=1e-5
    )


def test_plan_drops_the_least_sensitive_points(work: Path, chain: dict[str, dict[str, Any]]) -> None:
    plan = SPDPlan.load(work / "plan.json")
    scores = {2 * e["block"]: e["sensitivity"] for e in chain["sensitivity"]["algorithm1"]}
    assert plan.dropped == sorted(sorted(scores, key=scores.__getitem__)[:3]) == chain["plan"]["dropped"]
    tiers = {p // 2: "SB" if scores[p] <= TAU2 else "ESB" for p in plan.dropped}
    assert {i: b.tier for i, b in enumerate(plan.blocks) if b.tier} == tiers
    assert set(tiers.values()) == {"SB", "ESB"}


def test_group_orders_the_heads_of_the_extremely_sensitive_blocks(
    work: Path, chain: dict[str, dict[str, Any]]
) -> None:
    before, after = SPDPlan.load(work / "plan.json"), SPDPlan.load(work / "grouped.json")
    grouped = {i for i, b in enumerate(after.blocks) if b.kv_group_order is not None}
    assert grouped == {i for i, b in enumerate(before.blocks) if b.tier == "ESB"}
    assert {int(i) for i in chain["group"]["grouped"]} == grouped
    assert after.dropped == before.dropped


def test_distil_improves_every_unit_and_export_stores_it(
    work: Path, chain: dict[str, dict[str, Any]]
) -> None:
    plan = SPDPlan.load(work / "grouped.json")
    units = chain["distill"]["units"]
    assert [u["blocks"] for u in units] == [list(u) for u in plan.units()]
    assert all(u["loss_after"] < u["loss_before"] for u in units)
    exported = CheckpointReader(work / "spd")
    assert exported.plan is not None
    assert (exported.plan.dropped, exported.plan.blocks) == (plan.dropped, plan.blocks)
    for unit in units:
        (file,) = (work / "distilled" / "distill").glob(f"unit_{unit['blocks'][0]:04d}_*.safetensors")
        for name, tensor in load_file(file).items():
            block, relative = name.split(":")
            assert torch.equal(exported.block(int(block))[relative], tensor)


def test_an_export_is_evaluated_and_continued_as_transformers_runs_it(
    work: Path, chain: dict[str, dict[str, Any]]
) -> None:
    model = SPDLlamaForCausalLM.from_pretrained(chain["export"]["out"])
    result = answer("evaluate", "--model", work / "spd", *data(work))
    assert result["perplexity"] == pytest.approx(reference_perplexity(model, pieces(work)), rel=1e-4)
    assert result["dropped"] == chain["plan"]["dropped"]
    tokenizer = tiny_tokenizer()
    ids = tokenizer("Every rank holds", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    generate = ["generate", "--model", work / "spd", "--prompt", "Every rank holds", "--max-new-tokens", 6]
    assert answer(*generate)["completion"] == tokenizer.decode(
        expected[0, ids.shape[1] :], skip_special_tokens=True
    )
    printed = command(*generate)
    assert printed.out.startswith("Every rank holds")


def test_run_is_the_whole_chain(
    work: Path, one_rank: dict[str, Any], chain: dict[str, dict[str, Any]]
) -> None:
    """What `run` reports are the figures that the single commands find for what it wrote."""
    assert one_rank["dropped"] == chain["plan"]["dropped"]
    assert one_rank["all_reduces_per_token"] == {"before": 8, "after": 5}
    assert one_rank["bytes_per_token"] == {"before": 8 * 32 * 4, "after": 5 * 32 * 4}
    assert [u["losses"][0] for u in one_rank["units"]]
    scored = pieces(work, skip=8)
    plain = reference_perplexity(LlamaForCausalLM.from_pretrained(work / "model"), scored)
    final = reference_perplexity(SPDLlamaForCausalLM.from_pretrained(work / "run" / "export"), scored)
    assert one_rank["perplexity"]["plain"] == pytest.approx(plain, rel=1e-4)
    assert one_rank["perplexity"]["final"] == pytest.approx(final, rel=1e-4)
    assert one_rank["stage_seconds"].keys() >= {"sensitivity", "group", "distil", "export", "evaluate final"}
    assert SPDPlan.load(work / "run" / "plan.json") == CheckpointReader(work / "run" / "export").plan
    assert all(Path(p).exists() for p in one_rank["paths"].values())


def test_a_finished_run_answers_again_and_its_report_is_rewritten(
    work: Path, one_rank: dict[str, Any]
) -> None:
    export = files(work / "run" / "export")
    report = (work / "run" / "report" / "report.html").read_bytes()
    printed = command(*run_arguments(work, work / "run", "--tracking", "none"))
    assert printed.code == 0
    for words in (
        "sync points dropped: 3 of 8",
        "all-reduces per token",
        "report.html",
        "prompt: ",
        "\nspd: ",
    ):
        assert words in printed.out
    (work / "run" / "report" / "report.html").unlink()
    paths = answer("report", "--run", work / "run")["paths"]
    assert Path(paths["html"]).read_bytes() == report
    assert files(work / "run" / "export") == export


def test_the_same_seed_gives_the_same_bytes(work: Path, one_rank: dict[str, Any], tmp_path: Path) -> None:
    answer(*run_arguments(work, tmp_path / "again", "--tracking", "none"))
    assert files(tmp_path / "again" / "export") == files(work / "run" / "export")


def test_another_seed_gives_other_weights(work: Path, one_rank: dict[str, Any], tmp_path: Path) -> None:
    answer(*run_arguments(work, tmp_path / "other", "--tracking", "none", "--seed", 5))
    weights = "model.safetensors"
    assert files(tmp_path / "other" / "export")[weights] != files(work / "run" / "export")[weights]


def assert_close_weights(one: Path, other: Path) -> None:
    """Two safetensors files hold the same weights to the rounding of fp32 training."""
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(
            second[name], tensor, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_two_ranks_under_the_deepspeed_launcher_agree_with_one(
    work: Path, one_rank: dict[str, Any], tmp_path: Path
) -> None:
    several = answer(*run_arguments(work, tmp_path / "run", "--ranks", BRANCHES, "--tracking", "none"))
    assert (one_rank["ranks"], several["ranks"]) == (1, BRANCHES)
    assert several["dropped"] == one_rank["dropped"]
    for stage, perplexity in one_rank["perplexity"].items():
        assert several["perplexity"][stage] == pytest.approx(perplexity, rel=1e-3), stage
    weights = Path("export") / "model.safetensors"
    assert_close_weights(work / "run" / weights, tmp_path / "run" / weights)


def test_torchrun_distils_as_one_process_does(
    work: Path, chain: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    arguments = [
        "--model",
        work / "model",
        "--plan",
        work / "grouped.json",
        "--out",
        tmp_path / "d",
        *data(work),
    ]
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", BRANCHES]
    program += [ROOT / "tools" / "distill.py", *arguments, *TRAINING, "--tracking", "none", "--json"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        list(map(str, program)), capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()  # of rank 0 alone
    assert [u["blocks"] for u in json.loads(line)["units"]] == [
        u["blocks"] for u in chain["distill"]["units"]
    ]
    written = sorted((tmp_path / "d" / "distill").glob("*.safetensors"))
    assert len(written) == 3
    for file in written:
        assert_close_weights(work / "distilled" / "distill" / file.name, file)


@pytest.mark.parametrize(("which", "droppable"), [("mlp", {1, 3, 5}), ("any", set(range(7)))])
def test_other_sync_points(work: Path, tmp_path: Path, which: str, droppable: set[int]) -> None:
    """Units of several blocks are distilled and exported; the export computes what was measured."""
    arguments = run_arguments(work, tmp_path / "run", "--sync-points", which, "--tracking", "none")
    result = answer(*arguments)
    dropped = result["dropped"]
    assert set(dropped) <= droppable
    assert len(dropped) == math.floor(0.7 * len(droppable) + 0.5)
    assert any(len(u["blocks"]) > 1 for u in result["units"])
    final = reference_perplexity(
        SPDLlamaForCausalLM.from_pretrained(tmp_path / "run" / "export"), pieces(work, skip=8)
    )
    assert result["perplexity"]["final"] == pytest.approx(final, rel=1e-4)


def test_zero_shot_recovery_trains_nothing(work: Path, tmp_path: Path) -> None:
    result = answer(*run_arguments(work, tmp_path / "run", "--recovery", "zs", "--tracking", "none"))
    assert result["units"] == []
    assert result["perplexity"]["final"] == result["perplexity"]["zero_shot"]
    plan = CheckpointReader(tmp_path / "run" / "export").plan
    assert plan is not None
    assert {b.recovery for b in plan.blocks} == {"", "zs"}


def test_a_yaml_file_is_as_good_as_flags(work: Path, one_rank: dict[str, Any], tmp_path: Path) -> None:
    flags = [str(a) for a in run_arguments(work, tmp_path / "run", "--tracking", "none")[1:]]
    pairs = zip(flags[::2], flags[1::2], strict=True)
    options = {name.removeprefix("--").replace("-", "_"): yaml.safe_load(value) for name, value in pairs}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    answer("run", "--config", tmp_path / "run.yaml")
    assert files(tmp_path / "run" / "export") == files(work / "run" / "export")


def test_tools_do_what_the_commands_do(
    work: Path,
    chain: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def tool(name: str, *arguments: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
        assert ended.value.code == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    model = ["--model", work / "model"]
    measured, plan = tmp_path / "s.json", tmp_path / "plan.json"
    tool("measure_sensitivity.py", *model, "--branches", BRANCHES, "--out", measured, *data(work))
    assert measured.read_bytes() == (work / "s.json").read_bytes()
    chosen = ["--sensitivity", measured, "--branches", BRANCHES, "--drop-ratio", 0.7, *TIERS, *PAPER]
    tool("make_plan.py", *model, *chosen, "--out", plan)
    assert plan.read_bytes() == (work / "plan.json").read_bytes()
    planned = [*model, "--plan", work / "grouped.json"]
    tool("distill.py", *planned, "--out", tmp_path / "d", *data(work), *TRAINING, "--tracking", "none")
    assert files(tmp_path / "d") == files(work / "distilled")
    tool("export_spd.py", *planned, "--distilled", tmp_path / "d", "--out", tmp_path / "spd")
    assert files(tmp_path / "spd") == files(work / "spd")
    assert (
        tool("evaluate.py", "--model", tmp_path / "spd", *data(work))["dropped"] == chain["plan"]["dropped"]
    )


def test_wandb_has_everything_about_a_run(work: Path, one_rank: dict[str, Any]) -> None:
    records = read_offline_run(work / "run")
    updates = [r.run.config.update for r in records if r.HasField("run")]
    config = merged(
        item
        for update in [*updates, *(r.config.update for r in records if r.HasField("config"))]
        for item in update
    )
    assert (config["branches"], config["epochs"], config["learning_rate"]) == (BRANCHES, 2, 1e-3)
    history = [merged(r.history.item) for r in records if r.HasField("history")]
    for unit in one_rank["units"]:
        name = f"unit {unit['blocks'][0]}/loss"
        assert [row[name] for row in history if name in row] == unit["losses"]
    (path,) = (work / "run" / "wandb").glob("offline-run-*/files/media/table/sensitivity_*.table.json")
    table = json.loads(path.read_text())
    blocks, scores = (table["columns"].index(c) for c in ("block", "sensitivity"))
    measured = {e["block"]: e["sensitivity"] for e in one_rank["sensitivity"]["algorithm1"]}
    assert {row[blocks]: row[scores] for row in table["data"]} == pytest.approx(measured)
    summary = merged(item for r in records if r.HasField("summary") for item in r.summary.update)
    for stage, perplexity in one_rank["perplexity"].items():
        assert summary[f"perplexity/{stage}"] == pytest.approx(perplexity)
    logged = [r.request.log_artifact.artifact for r in records if r.request.HasField("log_artifact")]
    logged += [r.artifact for r in records if r.HasField("artifact")]
    (entry,) = next(a for a in logged if a.type == "plan").manifest.contents
    assert SPDPlan.load(entry.local_path) == SPDPlan.load(work / "run" / "plan.json")
