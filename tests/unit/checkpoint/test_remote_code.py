"""The modelling file of an export against the plain formula, and what transformers does with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from megatron_spd.checkpoint.remote_code.configuration_spd import SPDLlamaConfig
from megatron_spd.checkpoint.remote_code.modeling_spd import SPDLlamaForCausalLM, SyncPointRule
from tests.models import LLAMA3_ROPE, llama_config, randomise_
from tests.reference import Shape, blocks_forward, rms_norm

LAYERS = 3


def plan_dict(
    branches: int,
    dropped: Sequence[int],
    shifts: Sequence[tuple[int, str]] = (),
    layers: int = LAYERS,
    norms: Sequence[tuple[int, str]] = (),
) -> dict[str, Any]:
    """The part of a plan that the modelling file reads. ``shifts``, ``norms``: pairs (block, "attention" or "mlp")."""
    extras = {"shift": shifts, "norm": norms}
    return {
        "version": 1,
        "branches": branches,
        "sync_points": ["none" if p in dropped else "full" for p in range(2 * layers)],
        "blocks": [
            {f"{s}_{what}": (i, s) in places for s in ("attention", "mlp") for what, places in extras.items()}
            for i in range(layers)
        ],
    }


def spd_model(
    config: LlamaConfig, plan: dict[str, Any] | None, seed: int = 0, dtype: torch.dtype = torch.float64
) -> SPDLlamaForCausalLM:
    fields = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
    model = SPDLlamaForCausalLM(SPDLlamaConfig(spd_plan=plan, **fields))
    randomise_(model, seed)
    return model.to(dtype).eval()


def token_ids(batch: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(seed))


def reference_logits(state: dict[str, Tensor], config: SPDLlamaConfig, ids: Tensor) -> Tensor:
    """Logits [b, s, vocabulary] of the plain float64 formula."""
    shape = Shape(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.intermediate_size,
        eps=config.rms_norm_eps,
    )
    blocks = []
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        blocks.append({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    x = state["model.embed_tokens.weight"][ids].transpose(0, 1)
    dropped = [p for p, kind in enumerate(config.spd_plan["sync_points"]) if kind == "none"]
    x = blocks_forward(x, blocks, shape, config.branches, dropped)
    x = rms_norm(x, state["model.norm.weight"], config.rms_norm_eps).transpose(0, 1)
    return x @ state.get("lm_head.weight", state["model.embed_tokens.weight"]).T


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    """transformers computes norms and rotary angles in float32 whatever the dtype, hence 1e-5 of the largest value."""
    scale = float(expected.detach().abs().max())
    assert float((actual - expected).detach().abs().max()) <= 1e-5 * max(scale, 1e-3), what


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    heads, kv, branches = draw(
        st.sampled_from([(4, 2, 1), (4, 2, 2), (4, 4, 4), (6, 3, 3), (6, 6, 2), (6, 6, 3), (3, 3, 3)])
    )
    points = st.sets(st.integers(0, 2 * LAYERS - 1))
    places = st.tuples(st.integers(0, LAYERS - 1), st.sampled_from(["attention", "mlp"]))
    return {
        "heads": heads,
        "kv": kv,
        "plan": plan_dict(
            branches,
            draw(points),
            draw(st.sets(places, max_size=3)),
            norms=draw(st.sets(places, max_size=3)),
        ),
        "tied": draw(st.booleans()),
        "biases": draw(st.booleans()),
        "seed": draw(st.integers(0, 100)),
    }


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_any_schedule_equals_the_formula_forward_and_backward(case: dict[str, Any]) -> None:
    base = llama_config(
        8 * case["heads"], case["heads"], case["kv"], LAYERS, 48, tied=case["tied"], biases=case["biases"]
    )
    model = spd_model(base, case["plan"], case["seed"])
    ids = token_ids(seed=case["seed"])
    probe = torch.randn(
        2, 7, base.vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )

    parameters = dict(model.named_parameters())
    leaves = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    expected = reference_logits(leaves, model.config, ids)
    (expected * probe).sum().backward()
    actual = model(ids).logits
    (actual * probe).sum().backward()

    assert_close(actual, expected, "logits")
    for name, parameter in parameters.items():
        assert parameter.grad is not None, f"{name} got no gradient"
        assert_close(parameter.grad, leaves[name].grad, name)


def test_a_dropped_point_changes_the_output() -> None:
    """The comparison above would hold for a model that ignores its plan if dropping had no effect."""
    ids = token_ids()
    dense = spd_model(llama_config(), plan_dict(2, []))(ids).logits.detach()
    for dropped in ([0], [1], [0, 1]):
        logits = spd_model(llama_config(), plan_dict(2, dropped))(ids).logits.detach()
        assert float((logits - dense).abs().max()) > 0.1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_all_points_kept_is_llama_bit_for_bit(tied: bool, biases: bool) -> None:
    config = llama_config(tied=tied, biases=biases, rope_scaling=LLAMA3_ROPE)
    spd = spd_model(config, plan_dict(2, [2 * LAYERS - 1]), dtype=torch.float32)
    plain = LlamaForCausalLM(config).eval()
    plain.load_state_dict(spd.state_dict())
    assert all(type(layer) is LlamaDecoderLayer for layer in spd.model.layers)
    assert torch.equal(spd(token_ids()).logits, plain(token_ids()).logits)


@pytest.mark.parametrize("rope_scaling", [None, LLAMA3_ROPE], ids=["default", "llama3"])
def test_with_one_branch_any_schedule_is_llama(rope_scaling: dict[str, Any] | None) -> None:
    """G = 1: nothing is ever missing. Holds for what the plain formula lacks, like scaled rotary embeddings."""
    config = llama_config(biases=True, tied=False, rope_scaling=rope_scaling)
    spd = spd_model(config, plan_dict(1, [0, 1, 2, 4]))
    assert all(isinstance(layer, SyncPointRule) for layer in spd.model.layers)
    plain = LlamaForCausalLM(config).double().eval()
    plain.load_state_dict(spd.state_dict())
    ids = token_ids(length=80)
    assert_close(spd(ids).logits, plain(ids).logits, "logits")


def test_only_touched_blocks_are_replaced() -> None:
    plan = plan_dict(2, [2, 7], [(5, "mlp")], layers=7, norms=[(6, "attention")])
    model = spd_model(llama_config(layers=7), plan)
    replaced = [isinstance(layer, SyncPointRule) for layer in model.model.layers]
    assert replaced == [False, True, False, True, True, True, True]


def test_a_plan_from_before_branch_norms_is_read() -> None:
    plan = plan_dict(2, [0], [(1, "mlp")])
    older = plan | {"blocks": [{k: v for k, v in b.items() if "norm" not in k} for b in plan["blocks"]]}
    logits = [spd_model(llama_config(), p)(token_ids()).logits for p in (plan, older)]
    assert torch.equal(*logits)


MIXED = plan_dict(
    2, [0, 1, 3, 4], [(0, "mlp"), (2, "attention")], norms=[(0, "attention"), (0, "mlp"), (1, "mlp")]
)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cached_decoding_equals_full_recompute(attention: str) -> None:
    model = spd_model(llama_config(biases=True, rope_scaling=LLAMA3_ROPE), MIXED)
    model.set_attn_implementation(attention)
    ids = token_ids(length=12)
    full = model(ids, use_cache=False).logits
    out = model(ids[:, :5], use_cache=True)
    steps = [out.logits]
    for t in range(5, 12):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    assert_close(torch.cat(steps, 1), full, "logits")


def test_generate_equals_greedy_recompute() -> None:
    model = spd_model(llama_config(biases=True), MIXED)
    ids = token_ids(length=4)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    for _ in range(8):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, ids)


def test_left_padding_changes_nothing() -> None:
    model = spd_model(llama_config(biases=True), MIXED)
    short, long = token_ids(1, 5), token_ids(1, 9, seed=1)
    batch = torch.cat([torch.cat([torch.full((1, 4), 2), short], 1), long])
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(batch, attention_mask=mask, position_ids=positions).logits
    assert_close(padded[0, 4:], model(short).logits[0], "padded row")
    assert_close(padded[1], model(long).logits[0], "unpadded row")

    wanted = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = model.generate(batch, attention_mask=mask, **wanted)
    alone = model.generate(short, attention_mask=torch.ones_like(short), **wanted)
    assert torch.equal(together[0, 9:], alone[0, 5:])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    model = spd_model(llama_config(), MIXED).train()
    ids = token_ids()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert all(torch.equal(a, b) for a, b in zip(gradients(), plain, strict=True))


def test_recorded_hidden_states_are_as_if_synced() -> None:
    """With one branch X + P is Llama's residual; recorded states keep Llama's shape where sums are pending."""
    config = llama_config()
    spd = spd_model(config, plan_dict(1, [0, 1, 2, 3]))
    plain = LlamaForCausalLM(config).double().eval()
    plain.load_state_dict(spd.state_dict())
    ours = spd(token_ids(), output_hidden_states=True).hidden_states
    theirs = plain(token_ids(), output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == LAYERS + 1
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, "hidden state")


def test_save_and_reload(tmp_path: Path) -> None:
    model = spd_model(llama_config(tied=False, biases=True), MIXED, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    again = SPDLlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config.spd_plan == MIXED
    assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 3}, "version 3"),
        ({"branches": 5}, "5 branches"),
        ({"sync_points": ["full"] * 4}, "4 sync points"),
        ({"sync_points": ["lowbit"] * 6}, "lowbit"),
        ({"sync_points": ["int9"] * 6}, "int9"),
    ],
)
def test_a_plan_that_it_does_not_understand_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        spd_model(llama_config(), plan_dict(2, []) | change)


def test_low_bit_points_are_computed_exactly() -> None:
    plan = plan_dict(2, [0, 1])
    formats = ["int8", "int4/int8", "int2:g64"]
    points = [formats[p % 3] if kind == "full" else kind for p, kind in enumerate(plan["sync_points"])]
    low_bit = plan | {"version": 2, "sync_points": points}
    config = llama_config()
    ours, exact = spd_model(config, low_bit), spd_model(config, plan)
    assert torch.equal(ours(token_ids()).logits, exact(token_ids()).logits)
    # The last block has nothing but low-bit points: it is the dense one.
    assert type(ours.model.layers[2]) is LlamaDecoderLayer
