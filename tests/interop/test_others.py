"""nanoGPT's checkpoints, llama2.c's files and GGUF in: the same models as from elsewhere, and files that are wrong."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import fnlm
from cli.main import cli
from fnlm import interop, tokenizers, trained
from fnlm.checkpoint import CheckpointError
from fnlm.interop import gguf, nanogpt, vocabulary
from fnlm.interop.ties import join
from tests.interop.foreign_folders import SMALL, params_of

LLAMA: dict[str, Any] = {**SMALL, "positions": "rope", "norm": "rmsnorm", "mlp": "swiglu", "d_model": 64, "d_ff": 96}


def nanogpt_file(path: Path, **values: Any) -> fnlm.Params:
    """A ckpt.pt with names and layout as nanoGPT's train.py saves them."""
    cfg = fnlm.ModelConfig(**{**SMALL, "d_ff": None, **values})
    params = params_of(cfg)
    state = {f"_orig_mod.{t.theirs}": join(t, params, cfg) for t in nanogpt.ties(cfg)}
    state["_orig_mod.lm_head.weight"] = params["embed.tokens.weight"]
    state["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
    args = {
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        "block_size": 24,
        "bias": cfg.bias,
        "vocab_size": 300,
        "dropout": 0.0,
    }
    torch.save({"model": state, "model_args": args, "iter_num": 5, "optimizer": {}, "config": {"a": "b"}}, path)
    return params


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_by_explicit_command(bias: bool, tmp_path: Path) -> None:
    params = nanogpt_file(tmp_path / "ckpt.pt", bias=bias)
    (tmp_path / "input.txt").write_text("to be or not to be")
    words = ["import", str(tmp_path / "ckpt.pt"), "--out", str(tmp_path / "run"), "--tokenizer"]
    words.append(f"char:{tmp_path / 'input.txt'}")
    refused = CliRunner().invoke(cli, words)
    assert refused.exit_code == 4 and "is a pickle; if it is nanoGPT's and you trust it" in refused.stderr
    assert CliRunner().invoke(cli, [*words, "--from", "nanogpt"]).exit_code == 0
    found = trained.load(tmp_path / "run")
    assert all(torch.equal(found.params[k], params[k]) for k in params)
    assert found.tokenizer.decode(found.tokenizer.encode("to be")) == "to be"
    assert not interop.is_foreign(tmp_path / "ckpt.pt")


def test_a_pickle_that_runs_something_does_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model": Bomb(), "model_args": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="is not read as nanoGPT's checkpoint"):
        interop.read(tmp_path / "ckpt.pt", "nanogpt")
    (tmp_path / "other.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is not read as nanoGPT's checkpoint"):
        interop.read(tmp_path / "other.pt", "nanogpt")
    assert not (tmp_path / "ran").exists()


def test_llama2c_is_the_model_of_the_folder(test_data: Path) -> None:
    folder = test_data / "weights" / "stories260K"
    one, other = interop.read(folder / "stories260K.bin"), interop.read(folder)
    assert (one.cfg.kv_heads, one.cfg.seq_len, one.cfg.tied) == (4, 512, True)
    mine, theirs = one.load(), other.load()
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
    tokenizer = interop.read_tokenizer(one)
    assert tokenizer.prefix == (1,) and tokenizer.eot_id == 2
    assert tokenizer.encode("Once upon a time") == [403, 407, 261, 378]  # as llama2.c's run.c
    for text in ("Größe 😀", "a  b\n", "<s> is text"):
        assert tokenizer.decode(tokenizer.encode(text)) == " " + text
    assert tokenizers.loads(tokenizer.json).sha256 == tokenizer.sha256


def test_llama2c_tells_its_story(test_data: Path) -> None:
    path = test_data / "weights" / "stories260K" / "stories260K.bin"
    words = ["sample", str(path), "--prompt", "Once upon a time", "--greedy", "--max-new-tokens", "20"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Once upon a time, there was a little girl named Lily. She loved to play outsid")


def test_llama2c_version_1_and_what_is_wrong(tmp_path: Path) -> None:
    cfg = fnlm.ModelConfig(**{**LLAMA, "n_kv_heads": 2, "tied": False})
    params = params_of(cfg)
    from fnlm.interop import llama2c

    own = {t.theirs: join(t, params, cfg) for t in llama2c.ties(cfg)}
    head = struct.pack("<Ii7iB", llama2c.MAGIC, 1, 64, 96, 2, 4, 2, 300, 24, 0).ljust(256, b"\0")
    order = [f"{name}.{i}" for name in ("att_norm", "ffn_norm") for i in range(2)] + ["norm.0", "tokens.0"]
    order += [f"{name}.{i}" for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3") for i in range(2)] + ["head.0"]
    data = head + b"".join(own[name].numpy().tobytes() for name in order)
    file = tmp_path / "model.bin"
    file.write_bytes(data)
    found = interop.read(file)
    got = found.load()
    assert all(torch.equal(got[k], params[k]) for k in params)
    file.write_bytes(data[:-4])
    with pytest.raises(CheckpointError, match="by its header it must have"):
        interop.read(file, "llama2c")
    file.write_bytes(struct.pack("<Ii", llama2c.MAGIC, 2) + data[8:])
    with pytest.raises(CheckpointError, match="version 2, which is quantised"):
        interop.read(file)


def gguf_file(path: Path, tensors: dict[str, tuple[int, tuple[int, ...], bytes]], **more: Any) -> None:
    """A GGUF file as its specification lays it out."""

    def text(s: str) -> bytes:
        return struct.pack("<Q", len(s.encode())) + s.encode()

    def value(v: Any) -> bytes:
        if isinstance(v, str):
            return struct.pack("<I", 8) + text(v)
        if isinstance(v, list):
            kind, body = (8, b"".join(map(text, v))) if isinstance(v[0], str) else (5, struct.pack(f"<{len(v)}i", *v))
            return struct.pack("<IIQ", 9, kind, len(v)) + body
        return struct.pack("<If", 6, v) if isinstance(v, float) else struct.pack("<II", 4, v)

    about: dict[str, Any] = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 64,
        "llama.context_length": 24, "llama.feed_forward_length": 96, "llama.attention.head_count": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0,
    }  # fmt: skip
    about = {**about, "llama.attention.head_count_kv": 2, **more}
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(about))
    head += b"".join(text(k) + value(v) for k, v in about.items())
    at, body = 0, b""
    for name, (kind, shape, data) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, at)
        body += data.ljust(-(-len(data) // 32) * 32, b"\0")
        at = len(body)
    path.write_bytes(head.ljust(-(-len(head) // 32) * 32, b"\0") + body)


def q8_0(x: np.ndarray) -> bytes:
    rows = x.reshape(-1, 32)
    scale = (np.abs(rows).max(1, keepdims=True) / 127).astype(np.float16)
    whole = np.round(rows / np.maximum(scale.astype(np.float32), 1e-9)).astype(np.int8)
    return np.concatenate([scale.view(np.uint8), whole.view(np.uint8)], 1).tobytes()


def small_gguf(path: Path, kind: int, **more: Any) -> fnlm.Params:
    cfg = fnlm.ModelConfig(**{**LLAMA, "n_kv_heads": 2})
    params = params_of(cfg)
    tensors = {}
    for t in gguf.ties(cfg):
        x = join(t, params, cfg).contiguous()
        own = kind if x.ndim == 2 else 0
        data = q8_0(x.numpy()) if own == 8 else x.to(gguf.PLAIN[own]).view(torch.uint8).numpy().tobytes()
        tensors[t.theirs] = (own, tuple(x.shape), data)
    gguf_file(path, tensors, **more)
    return params


@pytest.mark.parametrize(("kind", "atol"), [(0, 0.0), (1, 1e-3), (8, 5e-3)], ids=["F32", "F16", "Q8_0"])
def test_gguf(kind: int, atol: float, tmp_path: Path) -> None:
    params = small_gguf(tmp_path / "a.gguf", kind)
    got = interop.read(tmp_path / "a.gguf").load()
    for name in params:
        torch.testing.assert_close(got[name].float(), params[name], rtol=0, atol=atol)


def test_four_bits_by_the_words_of_the_format() -> None:
    """Block of 32: scale (and minimum) as float16, then bytes whose low halves are the first 16 numbers."""
    draw = np.random.default_rng(0)
    packed = draw.integers(0, 256, (3, 16), dtype=np.uint8)
    d, m = np.float16(0.25), np.float16(-1.5)
    low = [[int(b) & 15 for b in row] + [int(b) >> 4 for b in row] for row in packed]
    q4_0 = np.concatenate([np.full((3, 1), d).view(np.uint8), packed], 1)
    q4_1 = np.concatenate([np.tile(np.array([[d, m]]).view(np.uint8), (3, 1)), packed], 1)
    assert (gguf.DEQUANTISED[2](q4_0.ravel()) == [[0.25 * (q - 8) for q in row] for row in low]).all()
    assert (gguf.DEQUANTISED[3](q4_1.ravel()) == [[0.25 * q - 1.5 for q in row] for row in low]).all()


def q6_k(path: Path) -> np.ndarray:
    """A file with one matrix in Q6_K, of random bytes whose scales are small; returns the bytes of its blocks."""
    small_gguf(path, 0)
    draw = np.random.default_rng(0)
    blocks = draw.integers(0, 256, (96 * 64 // 256, 210), dtype=np.uint8)
    blocks[:, 208:] = np.full((len(blocks), 1), 2.0**-12, np.float16).view(np.uint8)
    cfg = fnlm.ModelConfig(**{**LLAMA, "n_kv_heads": 2})
    params, tensors = params_of(cfg), {}
    for t in gguf.ties(cfg):
        x = join(t, params, cfg).contiguous()
        own = t.theirs == "blk.0.ffn_up.weight"
        data = blocks.tobytes() if own else x.numpy().tobytes()
        tensors[t.theirs] = (14 if own else 0, tuple(x.shape), data)
    gguf_file(path, tensors)
    return blocks


def test_k_quants_are_read_by_the_package(tmp_path: Path) -> None:
    """Q6_K of 256 numbers: 128 bytes of low halves, 64 of high quarters, 16 scales, and the scale of all as float16."""
    pytest.importorskip("gguf", reason="gguf is not installed; pip install 'fnlm[gguf]'")
    blocks = q6_k(tmp_path / "a.gguf")
    got = interop.read(tmp_path / "a.gguf").load()["blocks.0.mlp.up.weight"].flatten().view(-1, 256)
    for block, found in zip(blocks[:3], got, strict=False):
        low, high, scales = block[:128], block[128:192], block[192:208].view(np.int8)
        for i in range(256):
            half, part, at = i // 128, i % 128 // 32, i % 32
            nibble = int(low[64 * half + 32 * (part % 2) + at]) >> (4 * (part // 2)) & 15
            q = (nibble | (int(high[32 * half + at]) >> (2 * part) & 3) << 4) - 32
            assert float(found[i]) == pytest.approx(2.0**-12 * int(scales[i // 16]) * q)


def test_k_quants_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q6_k(tmp_path / "a.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["import", "a.gguf", "--tokenizer", "byte"])
    assert (result.exit_code, len(result.stderr.splitlines())) == (4, 1)
    assert "tensors of ggml's type 14 (K-quants and the like) need a package: pip install 'fnlm[gguf]'" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize(("kind", "atol"), [("fp32", 0.0), ("fp16", 1e-3), ("q8_0", 5e-3)])
@pytest.mark.parametrize("name", ["byte", "pieces"])
def test_gguf_out_and_in_again(kind: str, atol: float, name: str, tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "a", "b", "\u2581", "ab", "\u2581ab"]
    own = tokenizers.loads(vocabulary.from_pieces(pieces, [0.0] * 262 + [-1.0, -2.0]))
    tokenizer = own if name == "pieces" else tokenizers.named("byte")
    values = {**LLAMA, "n_kv_heads": 2, "vocab_size": tokenizer.vocab_size, "tied": False}
    cfg = fnlm.ModelConfig(**values, rope_scaling="linear", rope_factor=2.0)
    params, config = params_of(cfg), {"kind": "chat" if name == "byte" else "text"}
    interop.to_gguf(interop.Model(cfg, params, tokenizer, config), tmp_path / "a.gguf", kind)
    found = trained.load(tmp_path / "a.gguf")
    for k in params:
        torch.testing.assert_close(found.params[k], params[k], rtol=0, atol=atol)
    assert (found.cfg.rope_factor, found.is_chat) == (2.0, name == "byte")
    for text in ("abab ab", "Größe 😀\n"):
        assert found.tokenizer.encode(text) == tokenizer.encode(text)
    assert found.tokenizer.special == tokenizer.special
    assert found.tokenizer.prefix == tokenizer.prefix


@pytest.mark.parametrize(("values", "says"), [({}, "norm='layernorm'"), ({**LLAMA, "bias": True}, "bias=True")])
def test_gguf_is_for_the_llama_family(values: dict[str, Any], says: str, tmp_path: Path) -> None:
    cfg = fnlm.ModelConfig(**{**SMALL, **values})
    with pytest.raises(ValueError, match=says):
        interop.to_gguf(interop.Model(cfg, params_of(cfg), tokenizers.named("byte"), {}), tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba' is not supported"),
        ({"llama.expert_count": 8}, "expert_count=8"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type='longrope'"),
        ({"llama.block_count": 3}, "has no blk.2.attn_norm.weight"),
        ({"llama.attention.head_count_kv": 4}, "blk.0.attn_k.weight has shape"),
        ({"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a"]}, "tokenizer 'bert'"),
    ],
)
def test_gguf_that_is_not_supported(more: dict[str, Any], says: str, tmp_path: Path) -> None:
    small_gguf(tmp_path / "a.gguf", 0, **more)
    result = CliRunner().invoke(cli, ["import", str(tmp_path / "a.gguf"), "--tokenizer", "byte"])
    assert (result.exit_code, says in result.stderr, len(result.stderr.splitlines())) == (4, True, 1), result.stderr


@pytest.mark.parametrize("size", [4, 10, 24, 30, 100, 700, -1])
def test_half_a_gguf(size: int, tmp_path: Path) -> None:
    small_gguf(tmp_path / "a.gguf", 0)
    data = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(data[:size] if size > 0 else data[:-5000])
    with pytest.raises(CheckpointError):
        interop.read(tmp_path / "a.gguf").load()


def test_gguf_with_impossible_counts(tmp_path: Path) -> None:
    for counts in ((1 << 60, 1), (1, 1 << 60)):
        (tmp_path / "a.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, *counts) + b"\0" * 100)
        with pytest.raises(CheckpointError, match="damaged"):
            interop.read(tmp_path / "a.gguf")


def test_a_byte_level_vocabulary_of_gguf(tmp_path: Path) -> None:
    from fnlm.tokenizers.byte_level import CHARACTER

    tokens = [CHARACTER[b] for b in range(256)] + ["he", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    types = [1] * 257 + [3] * 3
    told = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "merges": ["h e"], "token_type": types}
    template = {"tokenizer.chat_template": "<|im_start|>{{ messages }}"}
    small_gguf(tmp_path / "a.gguf", 0, **{f"tokenizer.ggml.{k}": v for k, v in told.items()}, **template)
    found = trained.load(tmp_path / "a.gguf")
    assert found.tokenizer.encode("he42") == [256, ord("4"), ord("2")]
    assert found.tokenizer.eot_id == 259 and found.is_chat
    assert [f.name for f in trained.find(tmp_path)] == ["a.gguf"]
