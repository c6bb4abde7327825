"""A small made-up run, as the commands hand it to the report."""

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


def results():
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
