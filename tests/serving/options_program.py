"""Says what vLLM makes of options before it would start anything, and what the plug-in has registered."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any


def main(asked: str, answered: str) -> None:
    # Before the child is made, which then has it too.
    import vllm.engine.arg_utils  # noqa: F401
    from vllm.transformers_utils.config import get_config

    from megatron_spd.serving.vllm import register

    request: dict[str, Any] = json.loads(Path(asked).read_text())
    answer: dict[str, Any] = {}
    # vLLM loads plug-ins with the first options that it is given: up to here there are none.
    with multiprocessing.get_context("fork").Pool(1, without_plugins) as child:
        answer["without"] = child.apply(messages, (request["without"],))
    answer["with"] = messages(request["with"])
    # vLLM has called it once already.
    register()
    register()
    config = get_config(request["again"], trust_remote_code=False)
    answer["config"] = f"{type(config).__module__}.{type(config).__qualname__}"
    Path(answered).write_text(json.dumps(answer))


def without_plugins() -> None:
    os.environ["VLLM_PLUGINS"] = ""


def messages(cases: list[dict[str, Any]]) -> list[str]:
    """The error that each case of options ends in; "" where they fit."""
    from vllm.engine.arg_utils import EngineArgs

    found = []
    for options in cases:
        try:
            EngineArgs(**options).create_engine_config()
            found.append("")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
