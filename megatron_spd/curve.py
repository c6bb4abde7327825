"""``megatron-spd curve``: perplexity and accuracy against the share of dropped sync points, for several variants.

The points that each ratio drops are chosen once (one sweep and one search, with grouping on) and are the same for all
variants, so that a line differs from the next by what was done about the drops and by nothing else.

CURVE/run.json      what this curve is; another model, text or setting is refused
CURVE/stages/*.json every finished measurement: a killed curve repeats none
CURVE/RATIO/        calibrated and trained blocks of a ratio, for the variants b2b and finish
CURVE/curve.json    all numbers, after every measurement; curve.png, curve.md and curve.html are drawn from it
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_spd import stages
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.compensation import calibration_pieces
from megatron_spd.config import CurveOptions
from megatron_spd.curve_variants import TRAINED, Variants
from megatron_spd.errors import UserError
from megatron_spd.evaluate.statistics import paired_difference, perplexity_interval
from megatron_spd.evaluate.tasks import load_tasks, run_tasks, task_names
from megatron_spd.models.build import DTYPES
from megatron_spd.options import VARIANTS, SelectionOptions
from megatron_spd.plan import SPDPlan
from megatron_spd.planning import Choice, SetSearch, choose_plan, make_search
from megatron_spd.progress import progress_bar
from megatron_spd.report.curve import CURVE_FILE, write_curve_report
from megatron_spd.run_folder import RunFolder, run_identity
from megatron_spd.runtime.distributed import Runtime
from megatron_spd.sensitivity.orders import compare_orders
from megatron_spd.sensitivity.sweep import Method, sweep
from megatron_spd.sensitivity.tiers import scores_from
from megatron_spd.stages import TrainingText

#: Options that may differ when a curve is continued, beside those of a run.
_FREE_OPTIONS = ("ratios", "variants", "tasks", "limit", "task_variants", "orders")


def run_curve(reader: CheckpointReader, runtime: Runtime, options: CurveOptions) -> dict[str, Any]:
    """Measure what is not measured yet; returns the content of ``curve.json`` (see ``report/curve.py``) with ``paths``.

    Called on every rank. Raises UserError for tasks on several ranks, too little text, and a folder that holds
    something else.
    """
    if options.tasks is not None and runtime.world_size > 1:
        raise UserError(
            f"--tasks runs on one process, not on {runtime.world_size} ranks; make the curve without it first, then "
            "the same command with --tasks and without --ranks adds the accuracy"
        )
    tasks = None if options.tasks is None else load_tasks(task_names(options.tasks))
    texts = _Texts.read(reader, options)
    if set(TRAINED) & set(options.variant_names):
        # Here, before hours of measuring.
        texts.training.check(options, runtime.dp_size)
    folder = RunFolder(Path(options.out), _identity(reader, options, texts), runtime)
    return _Curve(reader, runtime, options, folder, texts, tasks).run()


@dataclass(frozen=True)
class _Texts:
    """Pieces [n, s] to measure sets on, to calibrate on, to train on, and to score on; the last are disjoint from the
    others."""

    measured: Tensor
    calibration: Tensor
    training: TrainingText
    scoring: Tensor

    @classmethod
    def read(cls, reader: CheckpointReader, options: CurveOptions) -> _Texts:
        training = TrainingText.of(reader, options, options.distill_sequences, options.finish_sequences)
        used = max(options.sequences + options.calibration_sequences, len(training))
        return cls(
            stages.calibration_tokens(reader, options),
            calibration_pieces(reader, options),
            training,
            stages.scoring_tokens(reader, options, used),
        )


def _identity(reader: CheckpointReader, options: CurveOptions, texts: _Texts) -> dict[str, Any]:
    training = texts.training
    pieces = (texts.measured, texts.calibration, training.units, training.finish, texts.scoring)
    return {"kind": "curve"} | run_identity(reader.fingerprint(), options, pieces, _FREE_OPTIONS)


class _Curve:
    """The measurements of one curve."""

    def __init__(
        self,
        reader: CheckpointReader,
        runtime: Runtime,
        options: CurveOptions,
        folder: RunFolder,
        texts: _Texts,
        tasks: Mapping[str, Any] | None,
    ) -> None:
        self.reader, self.runtime, self.options = reader, runtime, options
        self.folder, self.texts, self.tasks = folder, texts, tasks
        self.path = folder.folder
        self.dense = SPDPlan.dense(reader.base_model(), options.branches)
        self.variants = Variants(
            reader, runtime, options, folder, texts.calibration, texts.training, texts.scoring
        )
        self._search: SetSearch | None = None

    def run(self) -> dict[str, Any]:
        """All cells; ``curve.json`` grows with them."""
        options = self.options
        measured = self.folder.stage("sensitivity", lambda: self._sweep(grouped=True))
        choices = {ratio: self._choice(ratio, measured) for ratio in options.ratio_values}
        self._search = None
        plain = self.folder.stage(
            "plain", lambda: self.variants.plan_losses(SPDPlan.dense(self.dense.base_model, 1))
        )
        head = self._head(plain, self._orders(measured))
        cells: list[dict[str, Any]] = []
        # What sets were chosen with is at hand.
        names = sorted(options.variant_names, key=lambda name: (name != "all", VARIANTS.index(name)))
        with progress_bar(self.runtime, "curve", len(names) * len(choices), "cell") as bar:
            for variant in names:
                for ratio, choice in choices.items():
                    cells.append(self._cell(variant, ratio, choice.plan, plain))
                    cells.sort(key=lambda cell: (VARIANTS.index(cell["variant"]), cell["ratio"]))
                    self.folder.write_json(CURVE_FILE, head | {"cells": cells})
                    bar.update()
        result = json.loads(json.dumps(head | {"cells": cells}))
        paths = write_curve_report(result, self.path) if self.runtime.is_main else {}
        return result | {"paths": {name: str(path) for name, path in paths.items()}}

    def _head(self, plain: list[float], orders: dict[str, Any] | None) -> dict[str, Any]:
        """What ``curve.json`` says of the whole curve."""
        found, base = perplexity_interval(plain, self._scored), self.dense.base_model
        return {
            "model": Path(self.options.model).resolve().name,
            "branches": self.options.branches,
            "key_value_groups": base.num_key_value_heads,
            "sync_points": self.options.sync_points,
            "sync_points_total": len(self.dense.sync_points),
            "plain": {
                "perplexity": found.perplexity,
                "interval": [found.low, found.high],
                "tasks": self._accuracy("plain", lambda: Path(self.options.model)),
            },
            "orders": orders,
            "notes": [self._protocol()],
        }

    @property
    def _scored(self) -> int:
        """Scored tokens of a piece."""
        return self.texts.scoring.shape[1] - 1

    def _protocol(self) -> str:
        o, texts = self.options, self.texts
        data = o.data or "embedded text"
        scored = o.eval_data or f"{data}, pieces that nothing else uses"
        return (
            f"Sets chosen on {len(texts.measured)} pieces of {o.seq_length} tokens of {data}, calibrated on the next "
            f"{len(texts.calibration)}, trained on its first {len(texts.training)}; scored on {len(texts.scoring)} "
            f"pieces of {scored}. All variants of a ratio drop the same points."
        )

    # ---- what is dropped --------------------------------------------------------------------------------------

    def _sweep(self, grouped: bool) -> dict[str, Any]:
        which = self.options.sync_points
        method: Method = "algorithm1" if which == "attention" else "single"
        result = sweep(
            self.variants.streamer(),
            self.texts.measured,
            self.options.branches,
            method,
            which,
            self.path / f"sensitivity{'' if grouped else '_before'}.unfinished",
            self.variants.grouping("all") if grouped else "",
            self.variants.calibrated("all") if grouped else None,
            "kl",
        )
        return result | {"fingerprint": self.reader.fingerprint(), "grouped": grouped}

    def _choice(self, ratio: float, measured: dict[str, Any]) -> Choice:
        """The points that ``ratio`` drops, with their tiers."""
        options = self.options
        selection = SelectionOptions(
            sync_points=options.sync_points,
            drop_ratio=ratio,
            recovery="full",
            search_budget=options.search_budget,
        )

        def choose() -> dict[str, Any]:
            budget = selection.sets_to_measure
            if budget and self._search is None:
                self._search = make_search(
                    self.variants.streamer(),
                    options.branches,
                    self.variants.calibrated("all"),
                    self.texts.measured,
                    budget,
                    self.path / "search.json",
                    self.variants.grouping("all"),
                )
            base = self.dense.base_model
            choice = choose_plan(base, options.branches, measured, selection, options.model, self._search)
            return choice.to_dict()

        return Choice.from_dict(self.folder.stage(f"set {ratio:g}", choose))

    def _orders(self, measured: dict[str, Any]) -> dict[str, Any] | None:
        """The order of sensitivity without grouping beside that with it, if asked for."""
        if not self.options.orders:
            return None
        which = self.options.sync_points
        before = self.folder.stage("sensitivity before grouping", lambda: self._sweep(grouped=False))
        return compare_orders(scores_from(before, which), scores_from(measured, which))

    # ---- cells ------------------------------------------------------------------------------------------------

    def _cell(self, variant: str, ratio: float, plan: SPDPlan, plain: list[float]) -> dict[str, Any]:
        """One variant at one ratio."""
        name = f"{variant} {ratio:g}"
        nll = self.folder.stage(name, lambda: self.variants.losses(variant, ratio, plan))
        found = perplexity_interval(nll, self._scored)
        difference = paired_difference(plain, nll, self._scored)
        tasks = None
        if variant in self.options.task_variant_names:
            tasks = self._accuracy(name, lambda: self._export(variant, ratio, plan))
        return {
            "variant": variant,
            "ratio": ratio,
            "dropped": plan.dropped,
            "perplexity": found.perplexity,
            "interval": [found.low, found.high],
            "increase": [difference.increase, difference.low, difference.high],
            "tasks": tasks,
        }

    # ---- accuracy ---------------------------------------------------------------------------------------------

    def _accuracy(self, cell: str, folder: Callable[[], Path]) -> dict[str, Any] | None:
        """lm-eval's metrics by task of the model in ``folder()``, None without ``--tasks``."""
        if self.tasks is None or self.options.tasks is None:
            return None
        tasks, options = self.tasks, self.options
        asked = json.dumps([task_names(self.options.tasks), options.limit])
        mark = hashlib.sha256(asked.encode()).hexdigest()[:8]

        def measure() -> dict[str, Any]:
            from megatron_spd.evaluate.generate import load_for_generation

            model = load_for_generation(folder(), DTYPES[options.dtype])
            # Module's own method: transformers' wrapper of it hides its types.
            torch.nn.Module.to(model, self.runtime.device)
            found = run_tasks(tasks, model, self.reader.tokenizer(), limit=options.limit)
            shutil.rmtree(self._exported, ignore_errors=True)
            return found

        return self.folder.stage(f"{cell} accuracy {mark}", measure)

    @property
    def _exported(self) -> Path:
        """Where a cell lies as a folder while its tasks run."""
        return self.path / "exported"

    def _export(self, variant: str, ratio: float, plan: SPDPlan) -> Path:
        plan, weights = self.variants.model(variant, ratio, plan)
        shutil.rmtree(self._exported, ignore_errors=True)
        stages.write_export(self.reader, self.runtime, plan, weights, self._exported)
        return self._exported
