"""Generates with vLLM's offline engine as a request file says; see ``processes.generate``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(asked: str, answered: str) -> None:
    from vllm import LLM, SamplingParams

    request: dict[str, Any] = json.loads(Path(asked).read_text())
    llm = LLM(request["model"], **request["options"])
    greedy = SamplingParams(temperature=0, max_tokens=request["new_tokens"], ignore_eos=True)
    tokens, cached = [], []
    for prompts in request["rounds"]:
        given: list[Any] = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = llm.generate(given, greedy, use_tqdm=False)
        tokens.append([list(output.outputs[0].token_ids) for output in outputs])
        cached.append([output.num_cached_tokens for output in outputs])
    Path(answered).write_text(json.dumps({"tokens": tokens, "cached": cached}))


# vLLM starts its ranks by importing this module again.
if __name__ == "__main__":
    main(*sys.argv[1:])
