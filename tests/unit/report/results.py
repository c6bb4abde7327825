"""A small made-up run, and a small made-up curve, as the commands hand them to the report."""

from __future__ import annotations

import math

BLOCKS = 6


def sensitivity():
    def rise(point):
        return 40.0 if point < 2 else 0.3 * math.cos(point)

    return {
        "plain_perplexity": 20.0,
        "branches": 3,
        "tokens": 512,
        "algorithm1": [
            {"block": i, "perplexity": 20.0 + BLOCKS - i, "sensitivity": rise(2 * i) * 1.5}
            for i in range(BLOCKS)
        ],
        "single": [
            {
                "point": p,
                "block": p // 2,
                "kind": "mlp" if p % 2 else "attention",
                "perplexity": 20.0 + rise(p),
                "sensitivity": rise(p),
            }
            for p in range(2 * BLOCKS - 1)
        ],
    }


def low_bit():
    """Low-bit scores of all points of :func:`sensitivity` for two formats."""
    return [
        {
            "point": p,
            "block": p // 2,
            "kind": "mlp" if p % 2 else "attention",
            "collective": name,
            "perplexity": 20.0 + unit * p,
            "sensitivity": unit * p,
        }
        for p in range(2 * BLOCKS)
        for name, unit in (("int8", 1e-4), ("int4:g64", 0.1))
    ]


def results():
    """A run that measured everything."""
    return older_results() | {
        "sensitivity": sensitivity() | {"measure": "kl"},
        "recovery": "full",
        "perplexity": {"plain": 20.0, "zero_shot": 25.0, "grouped": 22.0, "final": 21.0},
        "interval": {
            "plain": [18.0, 22.5],
            "zero_shot": [23.0, 27.0],
            "grouped": [20.0, 24.0],
            "final": [19.0, 23.0],
        },
        "increase": {
            "zero_shot": [25.0, 22.25, 28.0],
            "grouped": [10.0, 8.5, 12.0],
            "final": [5.0, 4.0, 6.5],
        },
        "search": search(),
        "calibration": calibration(),
        "finish": finish(),
    }


def older_results():
    """What a run without grouping, search and finishing pass leaves."""
    return {
        "model": "tiny",
        "branches": 3,
        "ranks": 3,
        "sync_points_total": 2 * BLOCKS,
        "dropped": [2, 5, 6, 8],
        "perplexity": {"plain": 20.0, "zero_shot": 25.0, "final": 21.0},
        "all_reduces_per_token": {"before": 12, "after": 8},
        "bytes_per_token": {"before": 27648, "after": 18432},
        "stage_seconds": {"sensitivity": 61.2, "distill": 130.0},
        "paths": {"checkpoint": "RUN/export"},
        "units": [
            {
                "blocks": [2, 3],
                "recovery": "hg+b2b",
                "loss_before": 0.5,
                "loss_after": 0.25,
                "losses": [0.5, 0.4, 0.3, 0.25],
            },
            {"blocks": [4], "recovery": "b2b", "loss_before": 0.1, "loss_after": 0.09, "losses": [0.1, 0.09]},
        ],
        "samples": {"prompt": "The <b>", "plain": "one & two\n```", "spd": "three"},
        "tiers": {"1": "ISB", "2": "SB", "3": "ESB", "4": "ISB"},
        "sensitivity": sensitivity(),
        "notes": ["Calibrated on 512 tokens."],
    }


def search():
    def measured(points, perplexity, predicted, origin):
        return {"points": points, "perplexity": perplexity, "predicted": predicted, "origin": origin}

    return {
        "points": [2, 5, 6, 8],
        "perplexity": 24.0,
        "history": [
            measured([2, 3, 6, 8], 30.0, 26.0, "start"),
            measured([1, 3, 6, 8], math.inf, 27.0, "start"),
            measured([2, 5, 6], 23.0, 22.0, "extension"),
            measured([2, 5, 6, 8], 24.0, 25.0, "exchange"),
            measured([2, 5, 7, 8], 26.0, 23.5, "optimum"),
        ],
    }


def calibration():
    return [
        {
            "block": 1,
            "errors": {
                "mlp": {"none": 0.08, "shift": 0.06, "none + neurons": 0.05, "shift + neurons": 0.02},
                "heads": {"original": 0.04, "published": 0.05, "joint": 0.02},
            },
            "kept": {"mlp": "shift + neurons", "heads": "joint"},
        },
        {
            "block": 2,
            "errors": {"mlp": {"none": 0.3, "none + neurons": 0.1}},
            "kept": {"mlp": "none + neurons"},
        },
        {
            "block": 3,
            "errors": {
                "attention": {"none": 0.2, "refit": 0.25},
                "mlp": {"none": 0.03, "shift": 0.035},
                "heads": {"original": 0.03, "published": 0.04},
            },
            "kept": {"attention": "none", "mlp": "none", "heads": "original"},
        },
        {"block": 4, "errors": {}, "kept": {}},
    ]


def finish():
    return {
        "blocks": [1, 2, 3, 4],
        "which": "blocks",
        "kept": True,
        "kl_before": 0.25,
        "kl_after": 0.1,
        "best_step": 4,
        "losses": [0.3, 0.2, 0.15, 0.12, 0.11],
        "held_out": [[0, 0.25], [2, 0.15], [4, 0.1], [5, 0.11]],
    }


#: Dropped points of the curve's ratios.
RATIOS = {0.25: [2, 8, 9], 0.5: [2, 4, 5, 7, 8, 9], 1.0: list(range(11))}
_FACTORS = {
    "zero-shot": 1.0,
    "shift": 0.8,
    "heads": 0.9,
    "neurons": 0.6,
    "all": 0.4,
    "b2b": 0.2,
    "finish": 0.1,
}


def tasks(accuracy):
    return {
        "spd_continuation": {"documents": 50, "acc": {"value": accuracy, "stderr": 0.04}},
        "lambada": {"documents": 50, "perplexity": {"value": 7.0, "stderr": None}},
    }


def curve():
    """A curve of all variants at three ratios, with tasks of two of them and orders."""
    cells = []
    for variant, factor in _FACTORS.items():
        for ratio, dropped in RATIOS.items():
            increase = 100 * factor * ratio**2
            low, high = 0.9 * increase, 1.2 * increase
            cells.append(
                {
                    "variant": variant,
                    "ratio": ratio,
                    "dropped": dropped,
                    "perplexity": 20 * (1 + increase / 100),
                    "interval": [17 * (1 + increase / 100), 23 * (1 + increase / 100)],
                    "increase": [increase, low, high],
                    "tasks": tasks(0.6 - 0.3 * factor * ratio) if variant in ("zero-shot", "all") else None,
                }
            )
    points = [
        {"point": p, "before": v, "after": v / 2 - 0.1, "rank_before": 11.0 - p, "rank_after": 11.0 - p}
        for p, v in enumerate([40.0, 9.0, 4.0, 1.0, 0.9, 0.8, 0.7, 0.5, 0.4, 0.2, 0.1])
    ]
    return {
        "model": "tiny",
        "branches": 3,
        "key_value_groups": 3,
        "sync_points": "any",
        "sync_points_total": 2 * BLOCKS,
        "plain": {"perplexity": 20.0, "interval": [17.0, 23.0], "tasks": tasks(0.62)},
        "cells": cells,
        "orders": {"points": points, "spearman": 0.875},
        "notes": ["Scored on 8 pieces."],
    }
