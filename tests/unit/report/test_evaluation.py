"""The result of ``evaluate`` in words: what was measured, and nothing else."""

from __future__ import annotations

from typing import Any

from megatron_spd.report.evaluation import evaluation_text


def folder(perplexity: float, **more: Any) -> dict[str, Any]:
    interval = [perplexity - 1, perplexity + 1]
    plain = {"model": "DIR", "kind": "plain", "dropped": [], "sync_points": 8}
    return plain | {"perplexity": perplexity, "interval": interval} | more


def test_a_folder_alone() -> None:
    found = folder(20.0, tokens=120, confidence=0.95)
    assert (
        evaluation_text(found) == "DIR (plain): perplexity 20.0000 (95 %: 19.0000 to 21.0000) on 120 tokens"
    )


def test_against_another_with_tasks_and_generation() -> None:
    def tasks(value: float) -> dict[str, Any]:
        acc = {"value": value, "stderr": 0.02}
        return {
            "a_task": {"documents": 50, "acc": acc},
            "a_group": {"documents": None, "acc": acc | {"stderr": None}},
        }

    generation = {"agreement": 0.8, "same_prefix": 3.25, "rouge_l": 0.5, "prompts": 8, "new_tokens": 128}
    text = evaluation_text(
        folder(22.0, kind="spd", dropped=[0, 2, 4], tokens=120, confidence=0.95, tasks=tasks(0.5))
        | {"against": folder(20.0, tasks=tasks(0.75), increase=10.0, increase_interval=[8.0, 12.5])}
        | {"generation": generation}
    )
    assert text.splitlines() == [
        "DIR (SPD, 3 of 8 sync points dropped): perplexity 22.0000 (95 %: 21.0000 to 23.0000) on 120 tokens",
        "DIR (plain): perplexity 20.0000 (95 %: 19.0000 to 21.0000) on 120 tokens",
        "perplexity increase: +10.00 % (95 %, paired: +8.00 to +12.50 %)",
        "greedy continuations by 128 tokens of 8 prompts: 80.0 % of the next tokens agree, the first 3.2 tokens are "
        "the same, ROUGE-L 50.0 %",
        "",
        "task     metric  documents             value      of the other",
        "-------  ------  ---------  ----------------  ----------------",
        "a_task      acc         50  0.5000 +- 0.0200  0.7500 +- 0.0200",
        "a_group     acc          -            0.5000            0.7500",
    ]
