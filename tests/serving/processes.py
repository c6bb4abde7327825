"""Real vLLM engines and servers in processes of their own: started with a time-out, stopped with all their ranks.

vLLM changes the environment of the process it is imported in, so no test imports it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_spd.evaluate.generate import load_for_generation

ROOT = Path(__file__).parents[2]

NEEDS_VLLM = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed; `bash launch/vllm_env.sh` adds it",
)

#: Little memory, and prompts of more than a few dozen tokens are prefilled in chunks and cached in several blocks.
SMALL = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 8,
    "block_size": 32,
    "kv_cache_memory_bytes": 2**28,
    "distributed_executor_backend": "mp",
}


def environment(ranks: int, **changes: str) -> dict[str, str]:
    """The environment of an engine of ``ranks`` ranks: one core for each as far as there are cores."""
    cores = sorted(os.sched_getaffinity(0))
    bind = "|".join(str(cores[min(rank, len(cores) - 1)]) for rank in range(ranks))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    fixed = {
        "PYTHONPATH": path,
        "VLLM_CPU_OMP_THREADS_BIND": bind,
        # torch.compile traces the model whole, and runs what it traced without compiling kernels.
        "VLLM_CPU_CI_ENV": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # The engine in the program's own process (the server has it in another one): importing vLLM takes seconds.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    kept = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    return kept | fixed | changes


@contextlib.contextmanager
def started(command: Sequence[str], log: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """``command`` in a session of its own, its output in ``log``; what is left of the session is killed at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=env, cwd=log.parent, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        # The session's ranks, should its leader have ended without them.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_program(
    program: str, request: dict[str, Any], folder: Path, env: dict[str, str], timeout: float
) -> Any:
    """What ``tests/serving/PROGRAM.py`` answers to ``request``. Raises AssertionError with the end of its output if it
    fails or takes longer than ``timeout`` seconds."""
    asked, answered, log = folder / "request.json", folder / "answer.json", folder / "output.log"
    asked.write_text(json.dumps(request))
    answered.unlink(missing_ok=True)
    command = [sys.executable, "-m", f"tests.serving.{program}", str(asked), str(answered)]
    with started(command, log, env) as process:
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no answer within {timeout} s:\n{_end(log)}") from None
    assert code == 0, _end(log)
    return json.loads(answered.read_text())


def generate(
    model: Path,
    ranks: int,
    rounds: Sequence[Sequence[list[int]]],
    new_tokens: int,
    folder: Path,
    timeout: float = 700,
    sums: Sequence[tuple[str, int, int]] = (),
    **options: Any,
) -> dict[str, Any]:
    """What vLLM's offline engine answers to one batch of prompts (token ids) after the other: see
    ``engine_program.ask``, and ``Observer.sum_is_as_simulated`` for every case of ``sums`` [case][rank]."""
    request = {
        "model": str(model),
        "options": {**SMALL, "tensor_parallel_size": ranks, **options},
        "rounds": rounds,
        "new_tokens": new_tokens,
        "sums": sums,
    }
    return run_program("engine_program", request, folder, environment(ranks), timeout)


def transformers_tokens(model: Path, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy tokens of the folder's model in transformers, fp32, never stopping early."""
    return [tokens for tokens, _ in transformers_answers(model, prompts, new_tokens)]


@torch.inference_mode()
def transformers_answers(
    model: Path, prompts: Sequence[list[int]], new_tokens: int
) -> list[tuple[list[int], list[float]]]:
    """As :func:`transformers_tokens`, with the logarithm of each token's probability."""
    loaded = load_for_generation(model, torch.float32)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = loaded.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = out.sequences[0, len(prompt) :]
        logprobs = torch.cat(out.logits).log_softmax(-1)
        answers.append((tokens.tolist(), logprobs.gather(1, tokens[:, None])[:, 0].tolist()))
    return answers


@contextlib.contextmanager
def server(model: Path, ranks: int, folder: Path, timeout: float = 700, **options: Any) -> Iterator[str]:
    """vLLM's OpenAI server of MODEL on a free port: its address, once it answers.

    Started as a module: the command `vllm` asks for a package of that name, which vllm-cpu is not.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "server.log"
    given = {**SMALL, "tensor_parallel_size": ranks, "host": "127.0.0.1", "port": port, **options}
    flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *flags]
    with started(command, log, environment(ranks)) as process:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + timeout
        while not _answers(f"{address}/health"):
            assert process.poll() is None, f"the server ended with code {process.returncode}:\n{_end(log)}"
            assert time.monotonic() < deadline, f"no server within {timeout} s:\n{_end(log)}"
            time.sleep(0.25)
        yield address


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _end(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:]
