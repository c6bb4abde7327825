"""``megatron-spd run``: the whole chain into one run folder, stage by stage, resumable.

RUN/run.json            what this run is; another model, text or setting is refused
RUN/stages/*.json       the result and wall time of every finished stage
RUN/sensitivity.json    RUN/plan.json    RUN/distill/    RUN/export/    RUN/report/    RUN/results.json
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_spd import stages
from megatron_spd.calibration.stream import BlockStreamer
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.config import RunOptions
from megatron_spd.distill.tracking import Tracker
from megatron_spd.distill.units import UnitStore
from megatron_spd.errors import UserError
from megatron_spd.evaluate.generate import generate_text
from megatron_spd.evaluate.perplexity import plan_perplexity
from megatron_spd.files import write_text_atomic
from megatron_spd.plan import SPDPlan
from megatron_spd.report.html import write_report
from megatron_spd.runtime.distributed import Runtime
from megatron_spd.sensitivity.sweep import Method, sweep

PROMPT = "The most important thing about a network of computers is"
_SAMPLE_TOKENS = 40
#: Parts of a run's identity that say nothing to a reader, and what they stand for.
_HASHES = {"fingerprint": "model", "text": "text"}
#: Options that may differ when a run is continued.
_FREE_OPTIONS = {
    "config",
    "json",
    "debug",
    "local_rank",
    "max_minutes",
    "tracking",
    "out",
    "ranks",
    "tensor_parallel",
}


class RunFolder:
    """The folder of one run. Raises UserError if it holds another run, or something that is not a run."""

    def __init__(self, folder: Path, identity: dict[str, Any], runtime: Runtime) -> None:
        self.folder, self.runtime = folder, runtime
        problem = runtime.from_main(self._claim(identity) if runtime.is_main else None)
        if problem:
            raise UserError(problem)

    def _claim(self, identity: dict[str, Any]) -> str | None:
        stamp = self.folder / "run.json"
        if stamp.is_file():
            try:
                held = dict(json.loads(stamp.read_text(encoding="utf-8")))
            except (ValueError, TypeError):
                return f"{stamp} is not the record of a run; give a new or empty folder as --out"
            different = [k for k in identity if held.get(k) != identity[k]]
            if different:
                return (
                    f"{self.folder} holds another run: {_difference(different[0], held, identity)}; "
                    "give another --out, or the same options to continue it"
                )
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            return f"{self.folder} exists and is not a run folder; give a new or empty folder as --out"
        (self.folder / "stages").mkdir(parents=True, exist_ok=True)
        self.write_json("run.json", identity)
        return None

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file of the run atomically (main rank only)."""
        if self.runtime.is_main:
            write_text_atomic(self.folder / name, json.dumps(content, indent=1) + "\n")

    def stage(self, name: str, work: Callable[[], Any]) -> Any:
        """The JSON-able result of ``work()``, from the folder if the stage is finished. The same on every rank."""
        path = self.folder / "stages" / f"{name}.json"
        held = self.runtime.from_main(
            json.loads(path.read_text()) if self.runtime.is_main and path.is_file() else None
        )
        if held is not None:
            return held["result"]
        started = time.monotonic()
        # Through JSON, so that a resumed run sees exactly what the first one saw.
        result = json.loads(json.dumps(self.runtime.from_main(work())))
        self.write_json(f"stages/{name}.json", {"result": result, "seconds": time.monotonic() - started})
        return result

    def seconds(self) -> dict[str, float]:
        """Wall time of the finished stages in their order."""
        paths = sorted((self.folder / "stages").glob("*.json"), key=lambda p: p.stat().st_mtime_ns)
        return {p.stem: json.loads(p.read_text())["seconds"] for p in paths}


def _difference(key: str, held: dict[str, Any], wanted: dict[str, Any]) -> str:
    if key in _HASHES:
        return f"it was made from another {_HASHES[key]}"
    return f"its {key} is {held.get(key)!r}, this one's {wanted[key]!r}"


def run_pipeline(reader: CheckpointReader, runtime: Runtime, options: RunOptions) -> dict[str, Any]:
    """All stages; returns the results that the report is made of. Called on every rank."""
    started = time.monotonic()
    tokens, training, scoring = _texts(reader, options)
    if options.recovery == "paper":
        # Here, before hours of measuring.
        stages.distill_settings(options, None).check_amount(len(training), runtime.dp_size)
    folder = RunFolder(Path(options.out), _identity(reader, options, tokens, training, scoring), runtime)
    with Tracker(options.tracking, folder.folder, runtime.is_main) as tracker:
        tracker.config(dataclasses.asdict(options))
        return _Pipeline(reader, runtime, options, folder, tracker, started).run(tokens, training, scoring)


def _texts(reader: CheckpointReader, options: RunOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Pieces to measure sensitivity on, to distil on, and to score on; the last are disjoint from the others."""
    tokens = stages.calibration_tokens(reader, options)
    training = stages.calibration_tokens(reader, options, options.distill_sequences)
    used = 0 if options.eval_data else max(options.sequences, options.distill_sequences)
    scored = dataclasses.replace(options, data=options.eval_data or options.data)
    return tokens, training, stages.calibration_tokens(reader, scored, options.eval_sequences, used)


def _identity(reader: CheckpointReader, options: RunOptions, *texts: Tensor) -> dict[str, Any]:
    named = {k: v for k, v in dataclasses.asdict(options).items() if k not in _FREE_OPTIONS}
    text = hashlib.sha256(b"".join(t.numpy().tobytes() for t in texts)).hexdigest()
    return {"fingerprint": reader.fingerprint(), "text": text, **named}


class _Pipeline:
    """The stages of one run, in order."""

    def __init__(
        self,
        reader: CheckpointReader,
        runtime: Runtime,
        options: RunOptions,
        folder: RunFolder,
        tracker: Tracker,
        started: float,
    ) -> None:
        self.reader, self.runtime, self.options = reader, runtime, options
        self.folder, self.tracker, self.started = folder, tracker, started
        self.path = folder.folder

    def run(self, tokens: Tensor, training: Tensor, scoring: Tensor) -> dict[str, Any]:
        """Run what is not finished; returns and keeps the results."""
        measured = self.folder.stage("sensitivity", lambda: self._sensitivity(tokens))
        self.folder.write_json("sensitivity.json", measured)
        base = self.reader.base_model()
        chosen, thresholds = stages.choose_plan(
            base, self.options.branches, measured, self.options, self.options.model
        )
        plain = self.folder.stage("evaluate plain", lambda: self._perplexity(SPDPlan.dense(base, 1), scoring))
        zero_shot = self.folder.stage("evaluate zero-shot", lambda: self._perplexity(chosen, scoring))
        plan = SPDPlan.from_dict(self.folder.stage("group", lambda: self._group(chosen, tokens)))
        units = self.folder.stage("distil", lambda: self._distill(plan, training))
        plan = _with_real_recovery(plan, units).with_provenance(
            data=self.options.data or "embedded",
            sensitivity_tokens=tokens.numel(),
            distillation_tokens=training.numel() * self.options.epochs if units else 0,
            seed=self.options.seed,
            thresholds=dataclasses.asdict(thresholds),
            perplexity={"plain": plain, "zero_shot": zero_shot},
        )
        self.folder.stage("export", lambda: self._export(plan))
        final = self.folder.stage("evaluate final", lambda: self._exported_perplexity(scoring))
        samples = self.folder.stage("generate", self._samples)
        results = {
            "model": Path(self.options.model).resolve().name,
            "branches": plan.branches,
            "ranks": self.runtime.tp_size,
            "sync_points_total": len(plan.sync_points),
            "dropped": plan.dropped,
            "perplexity": {"plain": plain, "zero_shot": zero_shot, "final": final},
            **stages.traffic(plan, _itemsize(self.reader)),
            "tiers": {i: b.tier for i, b in enumerate(plan.blocks) if b.tier},
            "thresholds": dataclasses.asdict(thresholds),
            "units": units,
            "samples": samples,
            "sensitivity": measured,
            "notes": [self._protocol(tokens, training, scoring)],
        }
        return self._finish(results)

    def _finish(self, results: dict[str, Any]) -> dict[str, Any]:
        results["stage_seconds"] = self.runtime.from_main(
            self.folder.seconds() if self.runtime.is_main else None
        )
        report = self.path / "report"
        results["paths"] = {
            "checkpoint": str(self.path / "export"),
            "report": str(report / "report.html"),
            "plots": str(report),
        }
        self.folder.write_json("results.json", results)
        if self.runtime.is_main:
            write_report(results, report)
            self._track(results)
        self.runtime.barrier()
        return results

    def _sensitivity(self, tokens: Tensor) -> dict[str, Any]:
        which = self.options.sync_points
        method: Method = "algorithm1" if which == "attention" else "single"
        streamer = self._streamer(self.reader)
        result = sweep(
            streamer, tokens, self.options.branches, method, which, self.path / "sensitivity.unfinished"
        )
        return result | {"fingerprint": self.reader.fingerprint()}

    def _streamer(self, reader: CheckpointReader) -> BlockStreamer:
        return stages.make_streamer(reader, self.runtime, dtype=self.options.dtype)

    def _perplexity(self, plan: SPDPlan, tokens: Tensor) -> float:
        what = "zero-shot perplexity" if plan.dropped else "plain perplexity"
        return plan_perplexity(self._streamer(self.reader), plan, tokens, what)[0]

    def _exported_perplexity(self, tokens: Tensor) -> float:
        """Of the files as written: what a user of the export gets."""
        exported = CheckpointReader(self.path / "export")
        assert exported.plan is not None
        return plan_perplexity(self._streamer(exported), exported.plan, tokens, "final perplexity")[0]

    def _group(self, plan: SPDPlan, tokens: Tensor) -> dict[str, Any]:
        plan = stages.group_plan(self._streamer(self.reader), plan, tokens)
        return plan.to_dict()

    def _distill(self, plan: SPDPlan, tokens: Tensor) -> list[dict[str, Any]]:
        seconds = None
        if self.options.max_minutes is not None:
            # What is left of the time, less what the stages after this one will take.
            scoring = self.folder.seconds().get("evaluate zero-shot", 0.0)
            seconds = max(
                0.0, self.options.max_minutes * 60 - (time.monotonic() - self.started) - 3 * scoring
            )
            seconds = self.runtime.from_main(seconds)
        settings = stages.distill_settings(self.options, seconds)
        store = UnitStore(self.path / "distill", settings.identity(plan, tokens), self.runtime)
        return stages.run_distillation(self.reader, self.runtime, plan, tokens, settings, store, self.tracker)

    def _export(self, plan: SPDPlan) -> list[int]:
        exported = stages.write_export(
            self.reader, self.runtime, plan, self.path / "distill", self.path / "export"
        )
        if self.runtime.is_main:
            exported.save(self.path / "plan.json")
        return exported.dropped

    def _samples(self) -> dict[str, str]:
        if not self.runtime.is_main:
            return {}
        return {
            "prompt": PROMPT,
            "plain": generate_text(self.options.model, PROMPT, _SAMPLE_TOKENS),
            "spd": generate_text(self.path / "export", PROMPT, _SAMPLE_TOKENS),
        }

    def _protocol(self, tokens: Tensor, training: Tensor, scoring: Tensor) -> str:
        o = self.options
        calibration = o.data or "embedded text"
        scored = o.eval_data or f"{calibration}, pieces after those"
        return (
            f"Sensitivity on the first {len(tokens)} pieces of {tokens.shape[1]} tokens of {calibration}, "
            f"distillation on its first {len(training)}; scored on {len(scoring)} pieces of {scored}. Every piece "
            "stands alone and is scored from its second token. All-reduces and bytes count the blocks' sync points, "
            "for each token and rank."
        )

    def _track(self, results: dict[str, Any]) -> None:
        columns = ["point", "block", "kind", "perplexity", "sensitivity"]
        measured = results["sensitivity"]
        rows = [[e[c] for c in columns] for e in measured["single"] or ()]
        for e in measured["algorithm1"] or ():
            rows.append(
                [2 * e["block"], e["block"], "attention (Algorithm 1)", e["perplexity"], e["sensitivity"]]
            )
        self.tracker.table("sensitivity", columns, rows)
        summary = {f"perplexity/{k}": v for k, v in results["perplexity"].items()}
        self.tracker.summary(summary | {"dropped": len(results["dropped"])})
        self.tracker.plan_artifact(self.path / "plan.json")


def read_results(folder: Path) -> dict[str, Any]:
    """The results of a finished run. Raises UserError if there are none."""
    path = folder / "results.json"
    if not path.is_file():
        raise UserError(
            f"{folder} holds no finished run (no results.json); finish it with `megatron-spd run --out {folder}`"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _with_real_recovery(plan: SPDPlan, units: list[dict[str, Any]]) -> SPDPlan:
    """The plan with the recovery that each distilled block ended with."""
    for unit in units:
        for block in unit["blocks"]:
            planned = plan.blocks[block].recovery
            if planned.endswith("b2b") and not unit["kept"]:
                plan = plan.with_block(block, recovery="zs")
    return plan


def _itemsize(reader: CheckpointReader) -> int:
    return torch.empty((), dtype=reader.dtype(reader.family.final_norm)).element_size()
