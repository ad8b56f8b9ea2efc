"""Hugging Face folders in: every family, published models, and folders that are wrong."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import fnlm
from cli.main import cli
from fnlm import checkpoint, interop, tokenizers, trained
from fnlm.checkpoint import CheckpointError
from fnlm.interop.families import BY_ARCHITECTURE, GPT2, LLAMA, NEOX
from fnlm.rotary import amplitude, frequencies
from tests.interop.foreign_folders import BYTES, CASES, CONFIGS, NAMES, written

LLAMA_VALUES = CONFIGS["LlamaForCausalLM"][0]


@pytest.mark.parametrize(("family", "values"), CASES, ids=NAMES)
def test_each_family_is_read(family: Any, values: dict[str, Any], tmp_path: Path) -> None:
    cfg, params = written(tmp_path, family, values)
    model = interop.read(tmp_path)
    assert replace(model.cfg, d_ff=cfg.ff_dim, d_head=cfg.d_head, n_kv_heads=cfg.n_kv_heads, **_same(cfg)) == cfg
    got = model.load()
    assert list(got) == list(params)
    assert all(torch.equal(got[k], params[k]) and got[k].is_contiguous() for k in params)


def _same(cfg: fnlm.ModelConfig) -> dict[str, Any]:
    """Fields that say the same in several ways."""
    return {"norm_bias": cfg.norm_bias, "rope_original": cfg.rope_original, "rope_high": cfg.rope_high}


def test_qkv_of_neox_lie_head_by_head(tmp_path: Path) -> None:
    """GPT-NeoX's fused rows are q of head 0, k of head 0, v of head 0, q of head 1, ...: computed here by loops."""
    cfg, params = written(tmp_path, NEOX, CONFIGS["GPTNeoXForCausalLM"][0])
    fused = load_file(tmp_path / "model.safetensors")["gpt_neox.layers.0.attention.query_key_value.weight"]
    k = cfg.head_dim
    for head in range(cfg.n_heads):
        for part, name in enumerate("qkv"):
            rows = fused[(3 * head + part) * k : (3 * head + part + 1) * k]
            assert torch.equal(rows, params[f"blocks.0.attn.{name}.weight"][head * k : (head + 1) * k])


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_stretched_rope_by_its_formula(kind: Any) -> None:
    own = {"rope_original": 64, "rope_low": 1.0, "rope_high": 4.0 if kind == "llama3" else 32.0}
    cfg = fnlm.ModelConfig(**{**LLAMA_VALUES, "d_head": 32}, rope_scaling=kind, rope_factor=8.0, **own)
    got = frequencies(cfg, torch.device("cpu")).tolist()
    theta, r = cfg.rope_theta, cfg.rope_dim
    for i, x in enumerate(got):
        plain = theta ** (-2 * i / r)
        wave = 2 * math.pi / plain
        if kind == "linear":
            want = plain / 8
        elif kind == "llama3":
            smooth = (64 / wave - 1.0) / (4.0 - 1.0)
            want = plain / 8 if wave > 64 else plain if wave < 16 else (1 - smooth) * plain / 8 + smooth * plain
        else:
            low, high = (r * math.log(64 / (n * 2 * math.pi)) / (2 * math.log(theta)) for n in (32.0, 1.0))
            first, last = max(math.floor(low), 0), min(math.ceil(high), r - 1)
            ramp = min(max((i - first) / (last - first), 0), 1)
            want = plain / 8 * ramp + plain * (1 - ramp)
        assert x == pytest.approx(want, rel=1e-12)
    assert amplitude(cfg) == pytest.approx(0.1 * math.log(8) + 1 if kind == "yarn" else 1)


def test_what_a_stretched_model_decodes_is_its_forward(tmp_path: Path) -> None:
    from fnlm.decode import decode, init_cache

    cfg, params = written(tmp_path, LLAMA, CONFIGS["LlamaForCausalLM"][4])
    ids = torch.arange(20)[None]
    logits, _ = decode(params, ids, cfg, init_cache(cfg, 1))
    torch.testing.assert_close(logits, fnlm.forward(params, ids, cfg)[:, -1], rtol=0, atol=1e-5)


def test_gradients_reach_biases_of_queries_alone(tmp_path: Path) -> None:
    cfg, params = written(tmp_path, BY_ARCHITECTURE["Qwen2ForCausalLM"], CONFIGS["Qwen2ForCausalLM"][0])
    ids, ones = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0)), torch.ones(2, 24)
    values = {}
    for kernels in ("auto", "plain"):
        lifted = {k: v.clone().requires_grad_() for k, v in params.items()}
        batch = fnlm.Batch(ids, ids.roll(-1, 1), ones)
        loss = fnlm.lm_loss(lifted, batch, cfg, compute=fnlm.Compute(kernels=kernels))  # type: ignore[arg-type]
        values[kernels] = torch.autograd.grad(loss, list(lifted.values()))
    for a, b in zip(*values.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert "blocks.0.attn.q.bias" in params and "blocks.0.attn.out.bias" not in params


def test_dynamic_scaling_begins_beyond_the_context(tmp_path: Path) -> None:
    cfg, _ = written(tmp_path, LLAMA, LLAMA_VALUES, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    assert interop.read(tmp_path).cfg.rope_scaling == "none"
    assert cfg.seq_len == interop.read(tmp_path).cfg.seq_len


def test_a_sharded_index(tmp_path: Path) -> None:
    _, params = written(tmp_path, LLAMA, LLAMA_VALUES)
    whole = load_file(tmp_path / "model.safetensors")
    names = sorted(whole)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: whole[name] for name in own}, tmp_path / file)
    (tmp_path / "model.safetensors").unlink()
    placed = {name: file for file, own in parts.items() for name in own}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    got = interop.read(tmp_path).load()
    assert all(torch.equal(got[k], params[k]) for k in params)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model-00002-of-00002\.safetensors"):
        interop.read(tmp_path)


def test_a_base_model_without_prefix_and_with_buffers(tmp_path: Path) -> None:
    """The published gpt2 has neither the prefix nor the head, but the causal mask of each layer."""
    _, params = written(tmp_path, GPT2, CONFIGS["GPT2LMHeadModel"][0])
    whole = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    save_file(whole | {"h.0.attn.bias": torch.ones(1, 1, 24, 24).tril()}, tmp_path / "model.safetensors")
    got = interop.read(tmp_path).load()
    assert all(torch.equal(got[k], params[k]) for k in params)


def test_vocab_and_merges_become_a_tokenizer(tmp_path: Path) -> None:
    written(tmp_path, GPT2, CONFIGS["GPT2LMHeadModel"][0])
    vocabulary = json.loads(BYTES)["model"]["vocab"] | {"he": 257}
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\n")
    tokenizer = trained.load(tmp_path).tokenizer
    assert tokenizer.encode("hehe") == [257, 257]
    assert tokenizer.eot_id == 256


def test_a_chat_template_comes_along(tmp_path: Path) -> None:
    written(tmp_path, GPT2, CONFIGS["GPT2LMHeadModel"][0])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    model = trained.load(tmp_path)
    assert model.config["interop"]["template"] == "{{ messages }}"
    assert not model.is_chat


def test_half_precision_is_kept_by_import_and_widened_to_train(tmp_path: Path) -> None:
    written(tmp_path / "a", LLAMA, LLAMA_VALUES)
    whole = load_file(tmp_path / "a" / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in whole.items()}, tmp_path / "a" / "model.safetensors")
    assert {v.dtype for v in interop.read(tmp_path / "a").load().values()} == {torch.bfloat16}
    result = CliRunner().invoke(cli, ["import", str(tmp_path / "a"), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    _, params, _ = checkpoint.load_params(tmp_path / "run")
    assert {v.dtype for v in params.values()} == {torch.bfloat16}
    assert {v.dtype for v in trained.load(tmp_path / "run").params.values()} == {torch.float32}


def test_a_folder_is_found_and_served(tmp_path: Path) -> None:
    from webui.models import Models

    cfg, _ = written(tmp_path / "org" / "small", LLAMA, LLAMA_VALUES)
    assert [f.name for f in trained.find(tmp_path)] == ["org/small"]
    models = Models([tmp_path])
    (about,) = models.about().values()
    assert (about.name, about.context, about.parameters) == ("org/small", cfg.seq_len, fnlm.count(cfg))
    assert models.get("org/small").cfg.d_model == 32


def test_a_name_on_the_hub_is_looked_for_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = tmp_path / "hub" / "models--openai-community--gpt2"
    written(below / "snapshots" / "abc", GPT2, CONFIGS["GPT2LMHeadModel"][0])
    (below / "refs").mkdir()
    (below / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert trained.load("gpt2").cfg.d_model == 32
    assert [f.path for f in trained.find("openai-community/gpt2")] == [below / "snapshots" / "abc"]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' is not supported; supported: GPT2LMHeadModel"),
    ({"hidden_act": "mish"}, "hidden_act='mish' is not supported"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type='longrope' is not supported"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 3.0}}, "attention_factor=3.0"),
    ({"mlp_bias": True}, "mlp_bias=True is not supported"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": 48}, "model.embed_tokens.weight has shape (300, 32), by its config.json it must be (300, 48)"),
    ({"num_hidden_layers": 3}, "has no model.layers.2.input_layernorm.weight"),
    ({"num_hidden_layers": 1}, "beyond what its config.json describes, model.layers.1.input_layernorm.weight"),
    ({"num_hidden_layers": 10**9}, "1000000000 layers"),
    ({"num_hidden_layers": "two"}, "num_hidden_layers='two' must be a whole number"),
    ({"num_attention_heads": 5}, "n_heads=5 is not divisible by n_kv_heads=2"),
    ({"vocab_size": None}, "vocab_size=None must be"),
]


@pytest.mark.parametrize(("config", "says"), WRONG, ids=[next(iter(c)) + str(i) for i, (c, _) in enumerate(WRONG)])
def test_what_is_not_supported_is_refused_by_name(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    written(tmp_path / "a", LLAMA, LLAMA_VALUES, **config)
    result = CliRunner().invoke(cli, ["import", str(tmp_path / "a"), "--out", str(tmp_path / "run")])
    assert result.exit_code == 4
    assert says in result.stderr and len(result.stderr.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def _header(text: bytes, rest: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + rest


HOSTILE = {
    "empty": b"",
    "cut off": None,
    "header bomb": (1 << 62).to_bytes(8, "little") + b"{}",
    "not JSON": _header(b"{{{{{{{{"),
    "deep": _header(b"[" * 100000),
    "a list": _header(b"[1, 2]"),
    "huge tensor": _header(b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'),
    "negative": _header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[4,0]}}'),
    "odd dtype": _header(b'{"a":{"dtype":"F4","shape":[1],"data_offsets":[0,4]}}', b"0000"),
    "no offsets": _header(b'{"a":{"dtype":"F32","shape":[1]}}', b"0000"),
    "text shape": _header(b'{"a":{"dtype":"F32","shape":["1"],"data_offsets":[0,4]}}', b"0000"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_one_line(what: str, tmp_path: Path) -> None:
    written(tmp_path / "a", LLAMA, LLAMA_VALUES)
    file = tmp_path / "a" / "model.safetensors"
    data = HOSTILE[what]
    file.write_bytes(file.read_bytes()[:-100] if data is None else data)
    result = CliRunner().invoke(cli, ["import", str(tmp_path / "a"), "--out", str(tmp_path / "run")])
    assert result.exit_code == 4, result.output
    assert str(file) in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def _shards(folder: Path) -> None:
    """Two files and their index, of which the second has not come."""
    whole = load_file(folder / "model.safetensors")
    names = sorted(whole)
    save_file({name: whole[name] for name in names[:3]}, folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors").unlink()
    placed = {name: f"model-0000{1 + (i > 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def _half(name: str) -> Any:
    def cut(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return cut


def _larger(folder: Path) -> None:
    spec = json.loads(BYTES)
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 300, "content": "<|more|>"})
    (folder / "tokenizer.json").write_text(json.dumps(spec))


UNFIT = {
    "a shard is missing": (
        _shards,
        "has no model-00002-of-00002.safetensors, which model.safetensors.index.json names",
    ),
    "half of the weights": (_half("model.safetensors"), "is cut off"),
    "half of config.json": (_half("config.json"), "config.json is not JSON"),
    "half of tokenizer.json": (_half("tokenizer.json"), "its tokenizer cannot be read"),
    "a larger tokenizer": (_larger, "the tokenizer has 301 tokens, the model only vocab_size=300"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer; give one"),
}


@pytest.mark.parametrize("command", ["import", "eval", "sample", "merge", "export"])
@pytest.mark.parametrize("what", UNFIT)
def test_a_download_that_is_not_whole(what: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, exit code 4, nothing written, whichever command meets it."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "a", LLAMA, LLAMA_VALUES)
    spoil, says = UNFIT[what]
    spoil(tmp_path / "a")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    more = {"import": ["--out", "run"], "export": ["--out", "run"], "merge": ["--out", "run"], "eval": ["--data", "a"]}
    result = CliRunner().invoke(cli, [command, "a", *more.get(command, [])])
    assert result.exit_code == 4, result.output
    assert says in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    written(tmp_path, LLAMA, LLAMA_VALUES)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin, a pickle, which is not read"):
        interop.read(tmp_path)


def test_an_index_names_no_file_elsewhere(tmp_path: Path) -> None:
    written(tmp_path, LLAMA, LLAMA_VALUES)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(CheckpointError, match="not a file beside it"):
        interop.read(tmp_path)


def test_tokenizers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    written(tmp_path, LLAMA, {**LLAMA_VALUES, "vocab_size": 100})
    with pytest.raises(CheckpointError, match=r"the tokenizer has 257 tokens, the model only vocab_size=100"):
        trained.load(tmp_path)
    for size, fits in ((1500, True), (2000, False)):  # some rows are padding, most are not
        cfg = fnlm.ModelConfig(vocab_size=size, n_layers=1, n_heads=1, d_model=8, seq_len=8)
        with nullcontext() if fits else pytest.raises(CheckpointError, match="it is another model's"):
            interop.check_tokenizer(tokenizers.Byte(), cfg, "here")
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": []}}')
    with pytest.raises(CheckpointError, match="Unigram"):
        trained.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer; give one"):
        trained.load(tmp_path)


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    written(tmp_path / "a", LLAMA, LLAMA_VALUES)
    words = ["import", str(tmp_path / "a"), "--out", str(tmp_path / "run")]
    assert CliRunner().invoke(cli, words).exit_code == 0
    again = CliRunner().invoke(cli, words)
    assert (again.exit_code, "exists" in again.stderr) == (4, True)
    assert CliRunner().invoke(cli, [*words, "--force"]).exit_code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    other = CliRunner().invoke(cli, ["import", str(tmp_path / "a"), "--out", str(tmp_path / "mine"), "--force"])
    assert (other.exit_code, "is no run, and is not replaced" in other.stderr) == (4, True)
    assert (tmp_path / "mine" / "thesis.txt").is_file()
    said = CliRunner().invoke(cli, ["sample", str(tmp_path / "run"), "--prompt", "ab", "--max-new-tokens", "5"])
    assert said.exit_code == 0, said.output
