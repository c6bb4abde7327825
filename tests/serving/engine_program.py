"""Generates with vLLM's offline engine as a request file says; see ``processes.generate``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(asked: str, answered: str) -> None:
    from vllm import LLM

    request: dict[str, Any] = json.loads(Path(asked).read_text())
    llm = LLM(request["model"], **request["options"])
    answer = ask(llm, request["rounds"], request["new_tokens"], "worker_extension_cls" in request["options"])
    answer["sums"] = [llm.collective_rpc("sum_is_as_simulated", args=tuple(case)) for case in request["sums"]]
    Path(answered).write_text(json.dumps(answer))


def ask(llm: Any, rounds: list[list[list[int]]], new_tokens: int, observe: bool = False) -> dict[str, list]:
    """Greedy ``tokens`` and their ``logprobs``, and tokens of the prompt found in the prefix cache (``cached``), all
    [round][prompt]; where workers have an Observer, the ``collectives`` of every rank [round][rank]."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, logprobs=0)
    answer: dict[str, list] = {"tokens": [], "logprobs": [], "cached": [], "collectives": []}
    if observe:
        # torch.compile traces the first answer; it must not trace the observation.
        llm.generate({"prompt_token_ids": [3, 4]}, greedy, use_tqdm=False)
    for prompts in rounds:
        if observe:
            llm.collective_rpc("start_observing")
        given: list[Any] = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = llm.generate(given, greedy, use_tqdm=False)
        if observe:
            answer["collectives"].append(llm.collective_rpc("stop_observing"))
        texts = [output.outputs[0] for output in outputs]
        answer["tokens"].append([list(text.token_ids) for text in texts])
        answer["logprobs"].append(
            [[at[i].logprob for i, at in zip(text.token_ids, text.logprobs, strict=True)] for text in texts]
        )
        answer["cached"].append([output.num_cached_tokens for output in outputs])
    return answer


# vLLM starts its ranks by importing this module again.
if __name__ == "__main__":
    main(*sys.argv[1:])
