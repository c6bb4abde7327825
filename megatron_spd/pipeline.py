"""``megatron-spd run``: the whole chain into one run folder, stage by stage, resumable.

RUN/run.json            what this run is; another model, text or setting is refused
RUN/stages/*.json       the result and wall time of every finished stage
RUN/sensitivity.json    RUN/plan.json    RUN/distill/    RUN/export/    RUN/report/    RUN/results.json
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_spd import stages
from megatron_spd.calibration.stream import BlockStreamer, BlockWeights, UnitVariants
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.compensation import (
    calibrate_into,
    calibration_pieces,
    chosen_ingredients,
    measured_variants,
)
from megatron_spd.config import RunOptions
from megatron_spd.distill.tracking import Tracker
from megatron_spd.errors import UserError
from megatron_spd.evaluate.perplexity import plan_nll
from megatron_spd.evaluate.statistics import paired_difference, perplexity_interval
from megatron_spd.optimizing import choose_or_optimize
from megatron_spd.plan import SPDPlan
from megatron_spd.planning import Choice, make_search
from megatron_spd.run_folder import RunFolder, run_identity
from megatron_spd.runtime.distributed import Runtime
from megatron_spd.sensitivity.sweep import Method, sweep
from megatron_spd.stages import TrainingText

PROMPT = "The most important thing about a network of computers is"
_SAMPLE_TOKENS = 40


def run_pipeline(reader: CheckpointReader, runtime: Runtime, options: RunOptions) -> dict[str, Any]:
    """All stages; returns the results that the report is made of. Called on every rank."""
    started = time.monotonic()
    tokens, training, scoring = _texts(reader, options)
    if options.recovery in ("paper", "full"):
        # Here, before hours of measuring.
        training.check(options, runtime.dp_size)
    pieces = (tokens, training.units, training.finish, scoring)
    identity = run_identity(reader.fingerprint(), options, pieces)
    folder = RunFolder(Path(options.out), identity, runtime)
    with Tracker(options.tracking, folder.folder, runtime.is_main) as tracker:
        tracker.config(dataclasses.asdict(options))
        return _Pipeline(reader, runtime, options, folder, tracker, started).run(tokens, training, scoring)


def _texts(reader: CheckpointReader, options: RunOptions) -> tuple[Tensor, TrainingText, Tensor]:
    """Pieces to measure sensitivity on, to train on, and to score on; the last are disjoint from the others."""
    tokens = stages.calibration_tokens(reader, options)
    training = TrainingText.of(reader, options, options.distill_sequences, options.finish_sequences)
    measured = options.sequences + (options.calibration_sequences if options.grouped else 0)
    return tokens, training, stages.scoring_tokens(reader, options, max(measured, len(training)))


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
        self._variants: tuple[UnitVariants, str] | None = None

    def run(self, tokens: Tensor, training: TrainingText, scoring: Tensor) -> dict[str, Any]:
        """Run what is not finished; returns and keeps the results."""
        folder, base = self.folder, self.reader.base_model()
        measured = folder.stage("sensitivity", lambda: self._sensitivity(tokens))
        folder.write_json("sensitivity.json", measured)
        choice = Choice.from_dict(folder.stage("plan", lambda: self._choose(measured, tokens)))
        losses = {
            "plain": folder.stage("evaluate plain", lambda: self._losses(SPDPlan.dense(base, 1), scoring)),
            "zero_shot": folder.stage("evaluate zero-shot", lambda: self._losses(choice.plan, scoring)),
        }
        grouped = folder.stage("group", lambda: self._group(choice.plan, tokens))
        plan = SPDPlan.from_dict(grouped["plan"])
        if self.options.grouped:
            losses["grouped"] = folder.stage("evaluate grouped", lambda: self._losses(plan, scoring, True))
        units, finishing = folder.stage("distil", lambda: self._train(plan, training))
        plan = _with_real_recovery(plan, units)
        folder.stage("export", lambda: self._export(self._signed(plan, choice, tokens, training, losses)))
        losses["final"] = folder.stage("evaluate final", lambda: self._exported_losses(scoring))
        samples = folder.stage("generate", self._samples)
        results = {
            "model": Path(self.options.model).resolve().name,
            "branches": plan.branches,
            "ranks": self.runtime.tp_size,
            "recovery": self.options.recovery,
            "sync_points_total": len(plan.sync_points),
            "dropped": plan.dropped,
            "low_bit": plan.low_bit,
            **_perplexities(losses, scoring),
            **stages.traffic(plan, stages.activation_bytes(self.reader)),
            "tiers": {i: b.tier for i, b in enumerate(plan.blocks) if b.tier},
            "thresholds": dataclasses.asdict(choice.thresholds),
            "search": choice.search,
            "optimized": choice.optimized,
            "calibration": grouped["blocks"],
            "units": units,
            "finish": finishing,
            "samples": samples,
            "sensitivity": measured,
            "notes": [self._protocol(tokens, training, scoring)],
        }
        return self._finish(results)

    def _signed(
        self,
        plan: SPDPlan,
        choice: Choice,
        tokens: Tensor,
        training: TrainingText,
        losses: dict[str, list[float]],
    ) -> SPDPlan:
        """The plan with what it was made from."""
        figures = {
            k: perplexity_interval(v, self.options.seq_length - 1).perplexity for k, v in losses.items()
        }
        trains = self.options.recovery in ("paper", "full")
        return plan.with_provenance(
            data=self.options.data or "embedded",
            sensitivity_tokens=tokens.numel(),
            training_pieces=len(training) if trains else 0,
            recovery=self.options.recovery,
            seed=self.options.seed,
            thresholds=dataclasses.asdict(choice.thresholds),
            perplexity=figures,
        )

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
            # Only here: matplotlib takes seconds to import, which the other ranks are spared.
            from megatron_spd.report.run import write_report

            write_report(results, report)
            self._track(results)
        self.runtime.barrier()
        return results

    def _sensitivity(self, tokens: Tensor) -> dict[str, Any]:
        which = self.options.sync_points
        method: Method = "algorithm1" if which == "attention" else "single"
        formats = self.options.formats
        variants, grouping = self._measured_with()
        result = sweep(
            self._streamer(self.reader),
            tokens,
            self.options.branches,
            method,
            which,
            self.path / "sensitivity.unfinished",
            grouping,
            variants,
            "kl" if self.options.grouped or formats else "perplexity",
            formats,
        )
        return result | {"fingerprint": self.reader.fingerprint(), "grouped": self.options.grouped}

    def _measured_with(self) -> tuple[UnitVariants, str]:
        """What candidates are measured with; made once, for the sweep and the search."""
        if self._variants is None:
            self._variants = measured_variants(
                self._streamer(self.reader), self.options.branches, self.options, self.options.grouped
            )
        return self._variants

    def _choose(self, measured: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
        options, search = self.options, None
        if options.sets_to_measure:
            variants, grouping = self._measured_with()
            search = make_search(
                self._streamer(self.reader),
                options.branches,
                variants,
                tokens,
                options.sets_to_measure,
                self.path / "search.json",
                grouping,
            )
        choice = choose_or_optimize(self.reader, options.branches, measured, options, search)
        self._variants = None  # calibrated units of candidates are no longer needed
        return choice.to_dict()

    def _streamer(self, reader: CheckpointReader, weights: BlockWeights | None = None) -> BlockStreamer:
        streamer = stages.make_streamer(reader, self.runtime, dtype=self.options.dtype)
        if weights is not None:
            streamer.weights = weights
        return streamer

    def _losses(self, plan: SPDPlan, tokens: Tensor, calibrated: bool = False) -> list[float]:
        """Negative log-likelihood of every sequence."""
        what = (
            "grouped perplexity"
            if calibrated
            else "zero-shot perplexity"
            if plan.dropped
            else "plain perplexity"
        )
        weights = self._calibrated(plan) if calibrated else None
        return plan_nll(self._streamer(self.reader, weights), plan, tokens, what).tolist()

    def _exported_losses(self, tokens: Tensor) -> list[float]:
        """Of the files as written: what a user of the export gets."""
        exported = CheckpointReader(self.path / "export")
        assert exported.plan is not None
        return plan_nll(self._streamer(exported), exported.plan, tokens, "final perplexity").tolist()

    def _group(self, plan: SPDPlan, tokens: Tensor) -> dict[str, Any]:
        """The plan with its orders, and the record of every calibrated block."""
        streamer = self._streamer(self.reader)
        if not self.options.grouped:
            return {"plan": stages.group_plan(streamer, plan, tokens).to_dict(), "blocks": []}
        pieces, ingredients = calibration_pieces(self.reader, self.options), chosen_ingredients(self.options)
        plan, records = calibrate_into(streamer, plan, pieces, ingredients, self.path / "calibrated")
        return {"plan": plan.to_dict(), "blocks": records}

    def _calibrated(self, plan: SPDPlan) -> BlockWeights:
        return stages.final_weights(self.reader, plan, calibrated=self.path / "calibrated")

    def _train(self, plan: SPDPlan, text: TrainingText) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """Distillation and the finishing pass; nothing where the recovery asks for neither."""
        if self.options.recovery not in ("paper", "full"):
            return [], None
        stores = stages.training_stores(
            self.options, plan, text, self.path, self.runtime, "calibrated" if self.options.grouped else ""
        )
        return stages.run_training(
            self.reader,
            self.runtime,
            plan,
            text,
            self.options,
            stores,
            self.tracker,
            self._seconds_left(),
            self._calibrated(plan),
        )

    def _seconds_left(self) -> float | None:
        """What is left of ``--max-minutes``, less what the stages after training will take."""
        if self.options.max_minutes is None:
            return None
        scoring = self.folder.seconds().get("evaluate zero-shot", 0.0)
        left = self.options.max_minutes * 60 - (time.monotonic() - self.started) - 3 * scoring
        return self.runtime.from_main(max(0.0, left))

    def _export(self, plan: SPDPlan) -> list[int]:
        weights = stages.final_weights(self.reader, plan, self.path / "distill", self.path / "calibrated")
        exported = stages.write_export(self.reader, self.runtime, plan, weights, self.path / "export")
        if self.runtime.is_main:
            exported.save(self.path / "plan.json")
        return exported.dropped

    def _samples(self) -> dict[str, str]:
        if not self.runtime.is_main:
            return {}
        from megatron_spd.evaluate.generate import generate_text

        return {
            "prompt": PROMPT,
            "plain": generate_text(self.options.model, PROMPT, _SAMPLE_TOKENS),
            "spd": generate_text(self.path / "export", PROMPT, _SAMPLE_TOKENS),
        }

    def _protocol(self, tokens: Tensor, training: TrainingText, scoring: Tensor) -> str:
        o = self.options
        calibration = o.data or "embedded text"
        scored = o.eval_data or f"{calibration}, pieces after those"
        return (
            f"Sensitivity on the first {len(tokens)} pieces of {tokens.shape[1]} tokens of {calibration}, "
            f"training on its first {len(training)}; scored on {len(scoring)} pieces of {scored}. Every piece "
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
        for e in measured.get("low_bit") or ():
            rows.append(
                [e["point"], e["block"], f"{e['kind']}, {e['collective']}", *(e[c] for c in columns[3:])]
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
                plan = plan.with_block(block, recovery=stages.untrained_recovery(planned))
    return plan


def _perplexities(losses: dict[str, list[float]], scoring: Tensor) -> dict[str, Any]:
    """Perplexity after every step with its interval, and the paired increase over the plain model in percent."""
    length = scoring.shape[1] - 1
    intervals = {name: perplexity_interval(nll, length) for name, nll in losses.items()}
    differences = {
        name: paired_difference(losses["plain"], nll, length)
        for name, nll in losses.items()
        if name != "plain"
    }
    return {
        "perplexity": {name: interval.perplexity for name, interval in intervals.items()},
        "interval": {name: [i.low, i.high] for name, i in intervals.items()},
        "increase": {name: [d.increase, d.low, d.high] for name, d in differences.items()},
    }
