"""Several ranks of vLLM generate the tokens of the exported model in transformers, for every kind of schedule."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_spd.collective import CollectiveFormat
from megatron_spd.comm.lowbit import GATHER
from tests.models import make_export
from tests.serving.cases import LOW_BIT, NEW, PROMPTS, export
from tests.serving.processes import (
    NEEDS_VLLM,
    SMALL,
    generate,
    transformers_answers,
    transformers_tokens,
)

pytestmark = NEEDS_VLLM

#: 64 tokens, a chunk of a long prompt, are just large enough for low-bit messages.
HIDDEN = 264


def test_one_branch_on_each_of_three_ranks_with_low_bit_points(tmp_path: Path) -> None:
    """Messages of few tokens go through plain all-reduces and the answers are exact; where the long prompt is
    prefilled, kept points are low-bit: its tokens are the same, their probabilities nearly so."""
    model = export(tmp_path, 3, LOW_BIT, hidden=HIDDEN, heads=6, kv=3, biases=True)
    answers = transformers_answers(model, PROMPTS, NEW)
    short, long, both = PROMPTS[:2], PROMPTS[2:3], PROMPTS[2:]
    sums = [(text, 64, HIDDEN) for text in sorted({*LOW_BIT.values(), "int4/int8:g32"})]
    observer = "tests.serving.observer.Observer"
    found = generate(model, 3, [short, long, both], NEW, tmp_path, sums=sums, worker_extension_cls=observer)
    tokens, logprobs = [list(part) for part in zip(*answers, strict=True)]
    assert found["tokens"] == [tokens[:2], tokens[2:3], tokens[2:]]
    assert found["cached"][2] == [128, 96]
    assert found["sums"] == [[True] * 3] * len(sums)

    def errors(number: int, expected: list[list[float]]) -> list[float]:
        pairs = zip(found["logprobs"][number], expected, strict=True)
        return [abs(a - b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True)]

    assert max(errors(0, logprobs[:2])) < 1e-4
    assert 1e-3 < max(errors(1, logprobs[2:3])) < 0.2
    # The chunks of the long prompt that are not small, and nothing else.
    budget = SMALL["max_num_batched_tokens"]
    expected = sent_by_a_forward(budget * HIDDEN) * (len(PROMPTS[2]) // budget)
    low_bit = [[only_low_bit(calls, expected) for calls in ranks] for ranks in found["collectives"]]
    assert low_bit == [[[]] * 3, [expected] * 3, [[]] * 3]


def sent_by_a_forward(numel: int) -> list[list[object]]:
    """What each of three ranks gives in to its collectives for the low-bit points."""
    calls: list[list[object]] = []
    for text in LOW_BIT.values():
        fmt = CollectiveFormat.parse(text)
        chunk = fmt.chunk(numel, 3)
        calls.append(["all_to_all_single", 3 * fmt.scatter.wire_bytes(chunk)])
        calls.append([GATHER, fmt.gather.wire_bytes(chunk)])
    return calls


def only_low_bit(calls: list[list[object]], expected: list[list[object]]) -> list[list[object]]:
    """Without vLLM's own: the output layer is gathered, and small messages are summed."""
    return [call for call in calls if call[0] == "all_to_all_single" or call in expected]


def test_two_ranks_share_a_branch(tmp_path: Path) -> None:
    """M > G. (Ranks spin while they wait: four of them on two cores take longer to start than a test should.)"""
    model = export(tmp_path, 1, hidden=96, heads=8, kv=4, biases=True)
    expected = transformers_tokens(model, PROMPTS, NEW)
    assert generate(model, 2, [PROMPTS], NEW, tmp_path, timeout=900)["tokens"] == [expected]


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_smollm2(smollm2: Path, tmp_path: Path) -> None:
    """The real model with half of its attention points and a third of its MLP points dropped."""
    model = make_export(smollm2, tmp_path / "spd", 3, [*range(10, 40, 2), *range(21, 31, 3), 43, 45])
    prompts = [[504, 4421, 282, 253, 1418], list(range(1000, 1100))]
    expected = transformers_tokens(model, prompts, NEW)
    for ranks in 1, 3:
        assert generate(model, ranks, [prompts], NEW, tmp_path, timeout=450)["tokens"] == [expected]
