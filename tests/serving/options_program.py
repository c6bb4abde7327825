"""Says what vLLM makes of options before it would start anything, and what the plug-in has registered."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(asked: str, answered: str) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.transformers_utils.config import get_config

    from megatron_spd.serving.vllm import register

    request: dict[str, Any] = json.loads(Path(asked).read_text())
    messages = []
    for options in request["cases"]:
        try:
            EngineArgs(**options).create_engine_config()
            messages.append("")
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    answer: dict[str, Any] = {"messages": messages}
    if request.get("again"):
        # vLLM has called it once already.
        register()
        register()
        config = get_config(request["again"], trust_remote_code=False)
        answer["config"] = f"{type(config).__module__}.{type(config).__qualname__}"
    Path(answered).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
