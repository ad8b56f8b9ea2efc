"""Names, shapes, counts and first values of the parameters, against numbers worked out by other means."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fnlm
from fnlm.params import cast, init_std, is_norm, shapes, zeros_like
from fnlm.tree import equal
from tests.reference import BASE, CASES


def case(name: str, **more: Any) -> fnlm.ModelConfig:
    return fnlm.ModelConfig(**{**BASE, **CASES[name], **more})


def gpt2(layers: int, d: int) -> int:
    """The sum of a GPT-2 checkpoint: 12 d^2 + 13 d in a layer, two embeddings, one last norm."""
    return layers * (12 * d * d + 13 * d) + (50257 + 1024 + 2) * d


PUBLISHED = {
    "gpt2": (124_439_808, gpt2(12, 768)),
    "gpt2-medium": (354_823_168, gpt2(24, 1024)),
    "gpt2-large": (774_030_080, gpt2(36, 1280)),
    "gpt2-xl": (1_557_611_200, gpt2(48, 1600)),
    "ryan-12m": (12_492_800 + 13 * 320, 16000 * 320 + 6 * (4 * 320**2 + 2 * 320 * 1280) + 13 * 320),
    "shakespeare-char-cpu": (804_096, (65 + 64) * 128 + 4 * 12 * 128**2 + 9 * 128),
    "shakespeare-char": (10_745_088, (65 + 256) * 384 + 6 * 12 * 384**2 + 13 * 384),
    # SmolLM2-135M's published number: tied, 9 query and 3 key heads of 64, SwiGLU, two norms a layer and a last one.
    "llama-135m": (134_515_008, 49152 * 576 + 30 * (2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576) + 576),
    "tinystories-100m": (161_966_592, 100277 * 768 + 12 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768) + 768),
    "demo": (4_231_424, 2 * 657 * 128 + 2 * 12 * 128**2 + (4096 + 8192 + 16384) * 128),
    "shakespeare-speedrun-pure": (999_680, 2 * 65 * 128 + 5 * 12 * 128**2),
    "shakespeare-speedrun": (12_043_008, 2 * 65 * 128 + 5 * 12 * 128**2 + (4356 + 16384 + 65536) * 128),
}


@pytest.mark.parametrize("name", fnlm.PRESETS)
def test_counts_of_presets(name: str) -> None:
    number, formula = PUBLISHED[name]
    assert fnlm.count(fnlm.PRESETS[name]) == formula == number


def test_ryan_has_the_published_count_outside_the_norms() -> None:
    weights = {k: s for k, s in shapes(fnlm.PRESETS["ryan-12m"]).items() if not is_norm(k)}
    assert sum(map(math.prod, weights.values())) == 12_492_800


@pytest.mark.parametrize("name", ["gpt2", "llama-135m", "demo", "shakespeare-speedrun", "ryan-12m"])
def test_flops_per_token_are_the_formula(name: str) -> None:
    """6 per multiplying weight, and 12 L d T for scores and their use (PaLM, appendix B)."""
    layers, d, vocab, t, inner = {
        "gpt2": (12, 768, 50257, 1024, 12 * 768**2),
        "llama-135m": (30, 576, 49152, 2048, 2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536),
        "demo": (2, 128, 657, 256, 12 * 128**2),
        "shakespeare-speedrun": (5, 128, 65, 128, 12 * 128**2),
        "ryan-12m": (6, 320, 16000, 512, 4 * 320**2 + 2 * 320 * 1280),
    }[name]
    cfg = fnlm.PRESETS[name]
    assert fnlm.flops_per_token(cfg) == 6 * (layers * inner + vocab * d) + 12 * layers * d * t
    assert fnlm.flops_per_token(cfg, 64) == 6 * (layers * inner + vocab * d) + 12 * layers * d * 64


def test_a_window_bounds_the_flops_of_attention() -> None:
    cfg = case("plain")
    free, held = fnlm.flops_per_token(cfg), fnlm.flops_per_token(case("plain", window=4))
    assert free - held == 12 * 2 * 16 * (13 - 4)
    assert fnlm.flops_per_token(case("plain", window=100)) == free
    assert fnlm.flops_per_token(case("plain", window=4), 3) == fnlm.flops_per_token(cfg, 3)


@pytest.mark.parametrize("name", CASES)
def test_shapes_are_those_of_the_first_values(name: str) -> None:
    cfg = case(name)
    params = fnlm.init_params(cfg, fnlm.key(0))
    assert {k: tuple(v.shape) for k, v in params.items()} == shapes(cfg)
    assert list(params) == list(shapes(cfg))
    assert fnlm.count(cfg) == sum(v.numel() for v in params.values())
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in params.values())


@pytest.mark.parametrize("name", [name for name in CASES if name != "window-1"])  # a softmax of one has no gradient
def test_every_parameter_is_used(name: str) -> None:
    cfg = case(name, ngrams=((2, 144),)) if name == "ngrams" else case(name)
    params = {
        k: (v + 0.3 * torch.randn_like(v)).requires_grad_() for k, v in fnlm.init_params(cfg, fnlm.key(0)).items()
    }
    tokens = torch.arange(11)[None]
    loss = fnlm.forward(params, tokens, cfg).square().sum()
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    unused = [k for k, g in zip(params, grads, strict=True) if g is None or not g.abs().sum() > 0]
    assert not unused


def test_names_come_in_forward_order() -> None:
    assert list(shapes(case("llama", n_layers=1, tied=False, embed_norm=True, qk_norm=True, ngrams=((2, 9),)))) == [
        "embed.tokens.weight", "embed.ngram2.weight", "embed_norm.weight",
        "blocks.0.attn_norm.weight", "blocks.0.attn.q.weight", "blocks.0.attn.k.weight", "blocks.0.attn.v.weight",
        "blocks.0.attn.out.weight", "blocks.0.attn.q_norm.weight", "blocks.0.attn.k_norm.weight",
        "blocks.0.mlp_norm.weight", "blocks.0.mlp.gate.weight", "blocks.0.mlp.up.weight", "blocks.0.mlp.down.weight",
        "norm.weight", "head.weight",
    ]  # fmt: skip


NORMS = {"norm", "embed_norm", "attn_norm", "mlp_norm", "attn.q_norm", "attn.k_norm"}


@pytest.mark.parametrize("name", CASES)
def test_every_name_is_a_norm_a_matrix_or_a_bias(name: str) -> None:
    for key, shape in shapes(case(name, qk_norm=True, embed_norm=True)).items():
        module, kind = key.rsplit(".", 1)
        bare = module.split(".", 2)[2] if module.startswith("blocks.") else module
        norm = bare in NORMS
        assert is_norm(key) == norm
        assert fnlm.is_matrix(key) == (len(shape) == 2) == (kind == "weight" and not norm)
        assert fnlm.is_hidden_matrix(key) == (len(shape) == 2 and module.startswith("blocks."))


@pytest.mark.parametrize("key", ["normal.weight", "blocks.0.mlp.upnorm.weight", "norm.weights", "blocks.0.norm"])
def test_what_only_sounds_like_a_norm_is_none(key: str) -> None:
    assert not is_norm(key)


WIDE: dict[str, Any] = {"vocab_size": 400, "n_layers": 3, "n_heads": 4, "d_model": 128, "seq_len": 200, "d_ff": 300,
                        "bias": True, "qk_norm": True, "tied": False, "ngrams": ((2, 500),)}  # fmt: skip


@pytest.mark.parametrize("init", ["gpt2", "fan-in", "mup"])
def test_first_values_have_the_stated_spread(init: Any) -> None:
    cfg = fnlm.ModelConfig(**WIDE, init=init, mup_base=32, init_std=0.03)
    deep = 1 / math.sqrt(2 * 3)
    want = {
        "gpt2": dict.fromkeys(("tokens", "positions", "ngram2", "head", "q", "k", "v", "up"), 0.03)
        | {"out": 0.03 * deep, "down": 0.03 * deep},
        "fan-in": {"tokens": 1, "positions": 1, "ngram2": 0}
        | dict.fromkeys(("head", "q", "k", "v", "up", "out"), 0.8 / 128**0.5)
        | {"down": 0.8 / 300**0.5},
        "mup": dict.fromkeys(("tokens", "positions", "ngram2", "head"), 0.03)
        | dict.fromkeys(("q", "k", "v", "up"), 0.03 / 2)
        | {"out": 0.03 / 2 * deep, "down": 0.03 * math.sqrt(32 / 300) * deep},
    }[init]
    for key, value in fnlm.init_params(cfg, fnlm.key(5)).items():
        if is_norm(key) or key.endswith("bias"):
            assert torch.equal(value, torch.full_like(value, float(key.endswith("weight"))))
            continue
        std = want[key.split(".")[-2]]
        assert init_std(key, shapes(cfg)[key], cfg) == pytest.approx(std)
        assert float(value.std()) == pytest.approx(std, rel=0.03)
        assert abs(float(value.mean())) <= 4 * std / math.sqrt(value.numel())


def test_zero_inits() -> None:
    cfg = case("untied", zero_init_out=True, zero_init_head=True)
    params = fnlm.init_params(cfg, fnlm.key(0))
    zero = {k for k, v in params.items() if not v.any()}
    assert zero == {k for k in params if k.endswith(("attn.out.weight", "mlp.down.weight"))} | {"head.weight"}
    logits = fnlm.forward(params, torch.arange(11)[None], cfg)
    assert torch.equal(logits, torch.zeros_like(logits))


def test_no_two_tensors_start_alike() -> None:
    params = [v for k, v in fnlm.init_params(case("plain", d_ff=16), fnlm.key(0)).items() if fnlm.is_matrix(k)]
    heads = [tuple((v.flatten()[:8] / v.std()).tolist()) for v in params]
    assert len(set(heads)) == len(heads)


def test_same_key_same_values_other_key_others() -> None:
    cfg = case("llama")
    a, b, c = (fnlm.init_params(cfg, fnlm.key(s)) for s in (1, 1, 2))
    assert equal(a, b)
    assert not any(torch.equal(a[k], c[k]) for k in a if fnlm.is_matrix(k))
    assert all(v.dtype == torch.bfloat16 for v in fnlm.init_params(cfg, fnlm.key(0), dtype=torch.bfloat16).values())


@pytest.mark.parametrize(
    "option",
    [{"tied": False}, {"qk_norm": True}, {"bias": True}, {"embed_norm": True}, {"positions": "rope"}, {"mlp": "swiglu"},
     {"ngrams": ((2, 50),)}, {"norm_affine": False}],
)  # fmt: skip
def test_first_values_of_a_name_do_not_depend_on_the_other_names(option: dict[str, Any]) -> None:
    plain, more = (fnlm.init_params(case("plain", **o), fnlm.key(0)) for o in ({}, option))
    common = [k for k in plain if k in more]
    assert len(common) > 10
    assert [k for k in common if not torch.equal(plain[k], more[k])] == []


def test_ensembles_start_by_vmap_as_in_a_loop() -> None:
    cfg = case("bias", tied=False)
    keys = fnlm.split(fnlm.key(3), 4)
    together = torch.func.vmap(lambda k: fnlm.init_params(cfg, k))(keys)
    for i in range(4):
        one = fnlm.init_params(cfg, keys[i])
        for name, value in one.items():
            torch.testing.assert_close(together[name][i], value, rtol=1e-6, atol=1e-8)


def test_mup_rates() -> None:
    cfg = fnlm.ModelConfig(**WIDE, init="mup", mup_base=32)
    rates = {k: fnlm.mup_lr_scale(cfg, k) for k in shapes(cfg)}
    assert (
        rates["blocks.0.attn.q.weight"] == rates["blocks.2.mlp.up.weight"] == rates["blocks.1.attn.out.weight"] == 0.25
    )
    assert rates["blocks.0.mlp.down.weight"] == 32 / 300
    others = {k: r for k, r in rates.items() if not fnlm.is_hidden_matrix(k)}
    assert set(others.values()) == {1.0}
    plain = fnlm.ModelConfig(**WIDE)
    assert {fnlm.mup_lr_scale(plain, k) for k in shapes(plain)} == {1.0}


def test_mup_logits_move_alike_at_any_width() -> None:
    """One Adam-like step of sign(g) with muP's rates changes what the head sees by as much at width 32 as at 256."""
    moves = []
    for d in (32, 256):
        sizes = {"vocab_size": 17, "n_layers": 1, "n_heads": d // 16, "d_model": d, "seq_len": 8}
        cfg = fnlm.ModelConfig(**sizes, init="mup", mup_base=32, tied=False)
        params, tokens = fnlm.init_params(cfg, fnlm.key(1)), torch.arange(8)[None]
        batch = fnlm.Batch(tokens, tokens + 3, torch.ones(1, 8))
        live = {k: v.requires_grad_() for k, v in params.items()}
        grads = torch.autograd.grad(fnlm.lm_loss(live, batch, cfg), list(live.values()))
        after = {
            k: v.detach() - 1e-3 * fnlm.mup_lr_scale(cfg, k) * g.sign()
            for (k, v), g in zip(live.items(), grads, strict=True)
        }
        moves.append(float((fnlm.forward(after, tokens, cfg) - fnlm.forward(live, tokens, cfg)).detach().std()))
    assert 0.5 < moves[0] / moves[1] < 2


def test_copies() -> None:
    params = fnlm.init_params(case("plain"), fnlm.key(0))
    assert all(not v.any() and v.shape == params[k].shape for k, v in zeros_like(params).items())
    assert all(v.dtype == torch.bfloat16 for v in cast(params, torch.bfloat16).values())
