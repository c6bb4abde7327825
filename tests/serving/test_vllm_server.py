"""vLLM's OpenAI server with an SPD export on two ranks of two branches each, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import tiny_tokenizer
from tests.serving import cases
from tests.serving.processes import NEEDS_VLLM, server, transformers_tokens

pytestmark = NEEDS_VLLM

NEW = 12
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
QUESTION = "What is the value of the last statement of the function?"
PROMPTS = ["Every rank holds some of the heads", "The residual is added once, after " * 8]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    exported = cases.export(tmp_path_factory.mktemp("model"), 4, hidden=128, heads=8, kv=4, tied=False)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(exported)
    return exported


@pytest.fixture(scope="module")
def address(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server(model, 2, tmp_path_factory.mktemp("server"), served_model_name="spd") as running:
        yield running


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, list[int]]:
    """The greedy continuation of each prompt by transformers."""
    tokenizer = tiny_tokenizer()
    chat = f"user: {QUESTION}\nassistant:"
    prompts = [*PROMPTS, chat]
    ids = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
    return dict(zip([*PROMPTS, QUESTION], transformers_tokens(model, ids, NEW), strict=True))


def options() -> dict[str, object]:
    return {
        "model": "spd",
        "max_tokens": NEW,
        "temperature": 0,
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
    }


def client(address: str):  # type: ignore[no-untyped-def]
    from openai import OpenAI

    return OpenAI(base_url=f"{address}/v1", api_key="none", timeout=300, max_retries=0)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_completion(address: str, expected: dict[str, list[int]], prompt: str) -> None:
    answer = client(address).completions.create(prompt=prompt, **options())
    assert answer.choices[0].token_ids == expected[prompt]
    assert answer.usage.completion_tokens == NEW


def test_every_kind_of_schedule(address: str, model: Path) -> None:
    """A batch of token ids; asked again, from the prefix cache."""
    expected = transformers_tokens(model, cases.PROMPTS, NEW)
    # Otherwise equality would say nothing of the plan.
    plain = transformers_tokens(model.parent / "plain", cases.PROMPTS, NEW)
    assert all(a != b for a, b in zip(expected, plain, strict=True))
    for _ in range(2):
        answer = client(address).completions.create(prompt=cases.PROMPTS, **options())
        assert [choice.token_ids for choice in answer.choices] == expected


def test_chat(address: str, expected: dict[str, list[int]]) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    answer = client(address).chat.completions.create(messages=messages, **options())
    assert answer.choices[0].token_ids == expected[QUESTION]
    assert answer.choices[0].message.content


def test_streaming(address: str, expected: dict[str, list[int]]) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    stream = client(address).chat.completions.create(messages=messages, stream=True, **options())
    pieces = [chunk.choices[0].token_ids for chunk in stream if getattr(chunk.choices[0], "token_ids", None)]
    assert [token for piece in pieces for token in piece] == expected[QUESTION]
    assert len(pieces) > 1


def test_two_requests_at_once(address: str, expected: dict[str, list[int]]) -> None:
    from openai import AsyncOpenAI

    async def both() -> list[list[int]]:
        async with AsyncOpenAI(
            base_url=f"{address}/v1", api_key="none", timeout=300, max_retries=0
        ) as asking:
            asked = (asking.completions.create(prompt=p, **options()) for p in PROMPTS)
            return [answer.choices[0].token_ids for answer in await asyncio.gather(*asked)]

    assert asyncio.run(both()) == [expected[p] for p in PROMPTS]


def test_prefix_cache_is_used(address: str, expected: dict[str, list[int]]) -> None:
    """A long prompt asked twice gives the same tokens, the second time from the cache."""
    before = cache_hits(address)
    for _ in range(2):
        answer = client(address).completions.create(prompt=PROMPTS[1], **options())
        assert answer.choices[0].token_ids == expected[PROMPTS[1]]
    assert cache_hits(address) >= before + 32


def cache_hits(address: str) -> float:
    """Tokens that the server has found in its prefix cache so far, by its own metrics."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as response:
        text = response.read().decode()
    return sum(
        float(value) for value in re.findall(r"^vllm:prefix_cache_hits_total\{.*\} (\S+)$", text, re.M)
    )
