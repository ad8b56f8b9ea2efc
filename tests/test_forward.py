"""The model is what the papers say: every option against the loops of tests/reference.py, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fnlm
from fnlm.forward import hidden
from fnlm.ngrams import ngram_ids
from fnlm.params import shapes
from fnlm.places import rope_table
from tests import reference
from tests.reference import BASE, CASES, random_params, random_tokens, small_blocks

KERNELS = ("auto", "plain", "sdpa")


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def case(name: str, **more: Any) -> fnlm.ModelConfig:
    return fnlm.ModelConfig(**{**BASE, **CASES[name], **more})


@pytest.mark.parametrize("name", CASES)
def test_forward_equals_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 5)
    cfg = case(name)
    params, tokens = random_params(shapes(cfg)), random_tokens(cfg.vocab_size, 2, 13)
    want = reference.logits(params, tokens, cfg)
    assert want.std() > 0.1  # a model that says nothing would agree with anything
    for kernels in KERNELS:
        got = fnlm.forward(params, tokens, cfg, compute=fnlm.Compute(kernels=kernels))
        assert got.dtype == torch.float64
        close(got, want)


SAME_SHAPES = [name for name in CASES if name != "plain" and shapes(case(name)) == shapes(case("plain"))]


@pytest.mark.parametrize("option", SAME_SHAPES)
def test_every_option_changes_the_function(option: str) -> None:
    """A model that ignores an option would agree with a reference that ignores it too."""
    cfg, base, tokens = case(option), case("plain"), random_tokens(11, 1, 7)
    params = random_params(shapes(base))
    assert (fnlm.forward(params, tokens, cfg) - fnlm.forward(params, tokens, base)).abs().max() > 1e-3


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ["plain", "mqa", "alibi-6", "window-rope-gqa", "ngrams"])
@pytest.mark.parametrize(("b", "t"), [(1, 1), (3, 1), (1, 2), (1, 5)])
def test_smallest_shapes(name: str, kernels: str, b: int, t: int) -> None:
    cfg = case(name)
    params, tokens = random_params(shapes(cfg)), random_tokens(11, b, t)
    got = fnlm.forward(params, tokens, cfg, compute=fnlm.Compute(kernels=kernels))
    close(got, reference.logits(params, tokens, cfg))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    "name", ["plain", "window-alibi", "window-rope-gqa", "ngrams", "ngram-hash", "llama", "qk-norm"]
)
def test_a_later_token_changes_nothing_before_it(name: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 4)
    cfg, compute = case(name), fnlm.Compute(kernels=kernels)
    params, tokens = random_params(shapes(cfg)), random_tokens(11, 2, 13)
    before = fnlm.forward(params, tokens, cfg, compute=compute)
    for t in (1, 4, 7, 12):
        other = tokens.clone()
        other[:, t] = (other[:, t] + 1) % 11
        after = fnlm.forward(params, other, cfg, compute=compute)
        close(after[:, :t], before[:, :t], 1e-13)
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3


def test_nothing_beyond_the_windows_of_all_layers_is_seen() -> None:
    cfg = case("window", positions="rope", window=3)  # two layers of 3 see 2 + 2 back
    params, tokens = random_params(shapes(cfg)), random_tokens(11, 1, 13)
    other = tokens.clone()
    other[:, 0] = (other[:, 0] + 1) % 11
    moved = (fnlm.forward(params, tokens, cfg) - fnlm.forward(params, other, cfg)).abs().amax((0, 2))
    assert (moved[:5] > 1e-6).all()
    close(moved[5:], torch.zeros(8, dtype=torch.float64), 1e-13)


def test_samples_do_not_see_each_other() -> None:
    cfg = case("llama")
    params, tokens = random_params(shapes(cfg)), random_tokens(11, 3, 9)
    whole = fnlm.forward(params, tokens, cfg)
    for i in range(3):
        close(fnlm.forward(params, tokens[i : i + 1], cfg)[0], whole[i])


def test_prefixes_give_prefixes_also_beyond_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 3)
    cfg = case("window-alibi")
    params, tokens = random_params(shapes(cfg)), random_tokens(11, 2, 13)
    whole = fnlm.forward(params, tokens, cfg)
    for t in range(1, 14):
        close(fnlm.forward(params, tokens[:, :t], cfg), whole[:, :t])


def test_too_many_tokens_are_refused_with_the_remedy() -> None:
    cfg = case("rope")
    with pytest.raises(ValueError, match=r"14 tokens are more than seq_len=13; cut the input, or raise seq_len"):
        fnlm.forward(random_params(shapes(cfg)), random_tokens(11, 1, 14), cfg)


def test_rope_scores_depend_on_the_distance_alone() -> None:
    """A window of 2 and no other clue of place: equal tokens give equal logits once the window is full."""
    cfg = case("rope", window=2)
    out = fnlm.forward(random_params(shapes(cfg)), torch.full((1, 13), 4), cfg)[0]
    close(out[5:], out[4:-1])


def test_rope_tables_keep_their_digits_far_out() -> None:
    """Angles in float32 would be off by 1e-3 at position 30000."""
    cfg = case("rope", d_head=8)
    at = torch.tensor([30001])
    cos, _ = rope_table(at, cfg, torch.float32)
    close(cos[0, 1].double(), torch.tensor(30001 * 10000.0**-0.25, dtype=torch.float64).cos(), 1e-7)


@settings(max_examples=60)
@given(
    st.integers(2, 6),
    st.sampled_from([2, 3, 65, 511, 50257, 100277, 2**21]),
    st.sampled_from([1, 7, 4096, 65536, 10**6]),
    st.integers(0, 2**31),
)
def test_ngram_rows_are_the_formula_in_unbounded_integers(order: int, vocab: int, rows: int, seed: int) -> None:
    tokens = random_tokens(vocab, 2, 7, seed)
    ids = ngram_ids(tokens, order, rows, vocab)
    want = [[reference.ngram_row(row, t, order, rows, vocab) for t in range(7)] for row in tokens.tolist()]
    assert ids.tolist() == want
    assert 0 <= int(ids.min()) <= int(ids.max()) < rows


def test_exact_ngrams_do_not_collide() -> None:
    """All pairs of three tokens, and each first token: 3 * 3 + 3 rows used, all different."""
    pairs = torch.tensor([[a, b] for a in range(3) for b in range(3)])
    ids = ngram_ids(pairs, 2, 16, 3)
    assert len(set(ids[:, 1].tolist())) == 9
    assert len(set(ids[:, 0].tolist()) | set(ids[:, 1].tolist())) == 12


def test_use_is_asked_once_per_group_in_order() -> None:
    cfg = case("ngrams", tied=False, embed_norm=True)
    params, seen = random_params(shapes(cfg)), []

    def use(group: str, mine: fnlm.Params) -> fnlm.Params:
        seen.append((group, set(mine)))
        return {k: 2 * v for k, v in mine.items()}

    got = fnlm.forward(params, random_tokens(11, 1, 5), cfg, use=use)
    assert [group for group, _ in seen] == ["root", "blocks.0", "blocks.1"]
    names = {n for g, mine in seen for n in (mine if g == "root" else {f"{g}.{n}" for n in mine})}
    assert names == set(params)
    assert sum(len(mine) for _, mine in seen) == len(params)
    close(got, fnlm.forward({k: 2 * v for k, v in params.items()}, random_tokens(11, 1, 5), cfg))


@pytest.mark.parametrize("name", ["plain", "softcap", "mup-all", "untied"])
def test_hidden_and_head_make_the_logits(name: str) -> None:
    cfg = case(name)
    params, tokens = random_params(shapes(cfg)), random_tokens(11, 2, 6)
    x, root = hidden(params, tokens, cfg)
    assert x.shape == (2, 6, 16)
    raw = x @ root["head.weight" if not cfg.tied else "embed.tokens.weight"].T
    raw = raw * (cfg.mup_base / cfg.d_model if cfg.init == "mup" else 1.0)
    cap = cfg.logit_softcap
    close(fnlm.forward(params, tokens, cfg), raw if cap is None else cap * (raw / cap).tanh())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "window-alibi", "plain"])
def test_low_precision_is_near(name: str, dtype: torch.dtype) -> None:
    cfg = case(name)
    params = {k: v.to(dtype) for k, v in random_params(shapes(cfg)).items()}
    tokens = random_tokens(11, 2, 13)
    want = fnlm.forward({k: v.double() for k, v in params.items()}, tokens, cfg)
    for kernels in KERNELS:
        got = fnlm.forward(params, tokens, cfg, compute=fnlm.Compute(kernels=kernels))
        assert got.dtype == dtype
        close(got.double(), want, (0.06 if dtype == torch.bfloat16 else 0.01) * float(want.abs().max()))


@pytest.mark.parametrize("name", ["plain", "llama", "ngrams", "qk-layernorm-bias"])
def test_module_and_functional_call_are_the_forward(name: str) -> None:
    cfg = case(name)
    params, tokens = random_params(shapes(cfg)), random_tokens(11, 2, 6)
    module = fnlm.as_module(cfg)
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == shapes(cfg)
    got = torch.func.functional_call(module, params, (tokens,))
    assert torch.equal(got, fnlm.forward(params, tokens, cfg))
    assert torch.equal(fnlm.as_module(cfg, params)(tokens), got)


DROPS = {"dropout_embed": 0.3, "dropout_attn": 0.3, "dropout_residual": 0.3, "dropout_ngram": 0.3}


def test_no_key_is_evaluation_and_no_dropout_needs_no_key() -> None:
    cfg, wet = case("ngrams"), case("ngrams", **DROPS)
    params, tokens = random_params(shapes(cfg)), random_tokens(11, 2, 6)
    dry = fnlm.forward(params, tokens, cfg)
    assert torch.equal(dry, fnlm.forward(params, tokens, wet))
    assert torch.equal(dry, fnlm.forward(params, tokens, cfg, key=fnlm.key(3)))


@pytest.mark.parametrize("site", DROPS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_each_dropout_acts_by_key_and_on_no_rank_of_samples(site: str, kernels: str) -> None:
    cfg, compute = case("ngrams", **{site: 0.3}), fnlm.Compute(kernels=kernels)
    params, tokens = random_params(shapes(cfg)), random_tokens(11, 3, 8)
    tokens[2] = tokens[0]
    a, b, c = (fnlm.forward(params, tokens, cfg, key=fnlm.key(s), compute=compute) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert (a - c).abs().max() > 1e-3
    assert (a[0] - a[2]).abs().max() > 1e-3  # the same sample twice in a batch: two masks
    assert (a - fnlm.forward(params, tokens, cfg, compute=compute)).abs().max() > 1e-3
    keys = fnlm.fold_in(fnlm.key(1), torch.arange(3))
    close(fnlm.forward(params, tokens, cfg, key=keys, compute=compute), a)
    for part in (slice(0, 1), slice(1, 3), slice(2, 3)):
        close(fnlm.forward(params, tokens[part], cfg, key=keys[part], compute=compute), a[part])


def silent(cfg: fnlm.ModelConfig) -> fnlm.Params:
    """Blocks that add nothing, and no learned scale: what comes out is the normed embedding."""
    params = random_params(shapes(cfg))
    return {
        k: torch.zeros_like(v) if k.endswith(("attn.out.weight", "mlp.down.weight")) else v for k, v in params.items()
    }


def test_embedding_dropout_zeroes_the_stated_part_and_scales_the_rest() -> None:
    cfg = case("rmsnorm", norm_affine=False, dropout_embed=0.25, positions="none", seq_len=200, norm_eps=1e-12)
    params, tokens = silent(cfg), random_tokens(11, 8, 200)
    x, _ = hidden(params, tokens, cfg, key=fnlm.key(5))
    gone = x == 0
    assert abs(float(gone.double().mean()) - 0.25) < 0.01
    assert abs(float((gone[..., :-1] & gone[..., 1:]).double().mean()) - 0.0625) < 0.01
    assert abs(float((gone[:, :-1] & gone[:, 1:]).double().mean()) - 0.0625) < 0.01
    y = params["embed.tokens.weight"][tokens] * ~gone
    close(x, y / y.square().mean(-1, keepdim=True).sqrt(), 1e-6)


def test_ngram_dropout_takes_whole_rows_of_each_long_order_on_its_own() -> None:
    """One feature for each order: which of them are 0 tells which rows were dropped."""
    orders = {"norm_affine": False, "positions": "none", "seq_len": 200, "ngrams": ((2, 1), (3, 1), (4, 1))}
    cfg = case("rmsnorm", **orders, dropout_ngram=0.25)
    params = silent(cfg)
    params["embed.tokens.weight"] = torch.zeros(11, 16, dtype=torch.float64)
    for i, (order, _) in enumerate(cfg.ngrams):
        params[f"embed.ngram{order}.weight"] = torch.eye(16, dtype=torch.float64)[i : i + 1]
    x, _ = hidden(params, random_tokens(11, 8, 200), cfg, key=fnlm.key(5))
    two, three, four = (x[..., :3] == 0).double().unbind(-1)
    assert not two.any()
    assert abs(float(three.mean()) - 0.25) < 0.03
    assert abs(float(four.mean()) - 0.25) < 0.03
    assert abs(float((three * four).mean()) - 0.0625) < 0.02
    kept = (three + four) == 0
    close(x[..., 1][kept] / x[..., 0][kept], torch.full_like(x[..., 0][kept], 1 / 0.75), 1e-6)


@pytest.mark.parametrize("sites", [("dropout_attn",), ("dropout_residual",), tuple(DROPS)])
def test_remat_is_the_same_function_with_and_without_dropout(sites: tuple[str, ...]) -> None:
    cfg = case("ngrams", **dict.fromkeys(sites, 0.3))
    tokens = random_tokens(11, 2, 8)
    for key in (None, fnlm.key(4)):
        grads = []
        for remat in ("none", "block"):
            params = {k: v.requires_grad_() for k, v in random_params(shapes(cfg)).items()}
            out = fnlm.forward(params, tokens, cfg, key=key, compute=fnlm.Compute(remat=remat))
            grads.append([out.detach(), *torch.autograd.grad(out.square().sum(), list(params.values()))])
        for a, b in zip(*grads, strict=True):
            close(a, b)
