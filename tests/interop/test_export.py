"""Models for other software: each family's files and back bit for bit, what has no home, and both sides run."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer as Library

import fnlm
from cli.main import cli
from fnlm import checkpoint, interop, random, tokenizers, trained
from fnlm.checkpoint import CheckpointError
from fnlm.interop import Model, homes, shards, to_hf
from fnlm.interop.outward import CHATML, tokenizer_json
from fnlm.interop.parity import texts
from fnlm.params import shapes
from fnlm.types import TrainState
from tests.interop.foreign_folders import CASES, CONFIGS, NAMES, SMALL, params_of, written

ROPE = {"positions": "rope"}


def model_of(tokenizer: Any = None, config: dict[str, Any] | None = None, **values: Any) -> Model:
    tokenizer = tokenizer or tokenizers.named("byte")
    cfg = fnlm.ModelConfig(**{**SMALL, "vocab_size": tokenizer.vocab_size, **values})
    return Model(cfg, params_of(cfg), tokenizer, config or {"kind": "text"})


def run_of(folder: Path, model: Model) -> Path:
    """A run's folder with this model."""
    folder.mkdir()
    state = TrainState(torch.tensor(3), model.params, (), random.key(0))
    config = {"model": vars(model.cfg), **model.config}
    checkpoint.save(folder / "checkpoints", state, config=config, tokenizer=model.tokenizer.save(folder), what="params")
    return folder


@pytest.mark.parametrize(("family", "values"), CASES, ids=NAMES)
def test_out_and_in_again_is_bit_for_bit_the_same(family: Any, values: dict[str, Any], tmp_path: Path) -> None:
    _, params = written(tmp_path / "a", family, values)
    first = trained.load(tmp_path / "a", dtype="saved")
    to_hf(Model(first.cfg, first.params, first.tokenizer, first.config), tmp_path / "b")
    again = interop.read(tmp_path / "b")
    assert (again.cfg, again.architecture) == (first.cfg, family.architecture)
    got = again.load()
    assert all(torch.equal(got[k], params[k]) for k in params)
    both = [(tmp_path / x / "model.safetensors").read_bytes() for x in "ab"]
    assert both[0] == both[1]


def test_published_files_come_back_byte_for_byte(test_data: Path, tmp_path: Path) -> None:
    for name in ("mingpt-nano-sort", "stories260K"):
        folder = test_data / "weights" / name
        model = interop.read(folder)
        tokenizer = tokenizers.train("char", ["ab"])  # these have none, and keep rows that it does not name
        told = {"kind": "text", "interop": {"format": "hf", "kept": dict(model.kept)}}
        to_hf(Model(model.cfg, model.load(), tokenizer, told), tmp_path / name)
        assert (tmp_path / name / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
        theirs, ours = (json.loads((x / "config.json").read_text()) for x in (folder, tmp_path / name))
        for key in theirs.keys() & ours.keys() - {"n_inner", "attn_pdrop", "embd_pdrop", "resid_pdrop"}:
            assert ours[key] == theirs[key], key


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"positions": "alibi"}, r"positions='alibi'"),
        ({"positions": "none"}, r"positions='none'"),
        ({"n_kv_heads": 2}, r"GPT2LMHeadModel, there is no n_kv_heads=2"),
        ({"logit_softcap": 30.0}, r"logit_softcap=30.0"),
        ({"ngrams": ((2, 64),)}, r"ngrams=\(\(2, 64\),\)"),
        ({"init": "mup"}, r"init='mup'"),
        ({"embed_norm": True}, r"embed_norm=True"),
        ({**ROPE, "norm": "rmsnorm", "mlp": "relu2"}, r"mlp='relu2'"),
        ({**ROPE, "norm": "rmsnorm", "mlp": "swiglu", "parallel_residual": True}, r"parallel_residual=True"),
        ({**ROPE, "norm": "rmsnorm", "mlp": "swiglu", "rope_fraction": 0.5}, r"rope_fraction=0\.5"),
        ({**ROPE, "norm": "rmsnorm", "mlp": "swiglu", "window": 4, "qk_norm": True}, r"window=4|qk_norm=True"),
    ],
)
def test_what_has_no_home_is_named(values: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        to_hf(model_of(**values), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "architecture"),
    [
        ({}, "GPT2LMHeadModel"),  # without biases: written as zeros
        ({"norm_affine": False, "mlp": "relu2"}, "GPT2LMHeadModel"),
        ({"window": 24}, "GPT2LMHeadModel"),  # as wide as the context
        (ROPE, "GPTNeoXForCausalLM"),
        ({**ROPE, "mlp": "swiglu"}, "StableLmForCausalLM"),
        ({**ROPE, "mlp": "swiglu", "norm": "rmsnorm", "norm_affine": False}, "LlamaForCausalLM"),
        ({**ROPE, "mlp": "swiglu", "norm": "rmsnorm", "norm_affine": False, "qk_norm": True}, "Qwen3ForCausalLM"),
    ],
)
def test_what_they_always_have_is_written_so_that_it_does_nothing(
    values: dict[str, Any], architecture: str, tmp_path: Path
) -> None:
    model = model_of(**values)
    assert homes.home(model.cfg).architecture == architecture
    to_hf(model, tmp_path / "out")
    again = interop.read(tmp_path / "out")
    ids = torch.arange(24)[None]
    pair = ((again.load(), again.cfg), (model.params, model.cfg))
    got, want = (fnlm.forward({k: v.double() for k, v in p.items()}, ids, c) for p, c in pair)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_padding_of_the_vocabulary_stays_at_home(tmp_path: Path) -> None:
    model = model_of(vocab_size=320, tied=False)
    to_hf(model, tmp_path / "out")
    whole = load_file(tmp_path / "out" / "model.safetensors")
    assert whole["lm_head.weight"].shape == whole["transformer.wte.weight"].shape == (259, 32)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 259


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_a_tokenizer_gives_the_same_ids_elsewhere(kind: str) -> None:
    text = "The quick brown fox, größer als 7 Füchse?\n\n  Yes  😀 <tag>"
    made = tokenizers.named("byte") if kind == "byte" else tokenizers.train(kind, [text], 300)
    library = Library.from_str(tokenizer_json(made))
    for sample in [text, *texts(made)]:
        ids = library.encode(sample, add_special_tokens=False).ids
        assert ids == made.encode(sample)
        assert library.decode(ids) == made.decode(ids)
    assert all(library.token_to_id(token) == i for token, i in made.special.items())


def test_the_files_of_a_chat(tmp_path: Path) -> None:
    to_hf(model_of(config={"kind": "chat"}), tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "PARITY.json"}
    assert names >= {"tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
    read = {name: json.loads((tmp_path / "out" / name).read_text()) for name in names if name.endswith(".json")}
    assert read["config.json"]["eos_token_id"] == 258
    assert read["generation_config.json"]["eos_token_id"] == [258, 256]
    assert read["special_tokens_map.json"]["eos_token"] == "<|im_end|>"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHATML
    assert read["PARITY.json"] == {"checked": False}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_command_and_what_it_says_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fnlm.interop import parity

    monkeypatch.setattr(parity, "is_possible", lambda: False)
    run = run_of(tmp_path / "run", model_of())
    words = ["export", str(run), "--out", str(tmp_path / "out"), "--dtype", "bf16"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    assert "GPT2LMHeadModel, not compared" in result.stdout and "pip install 'fnlm[hub]'" in result.stderr
    whole = load_file(tmp_path / "out" / "model.safetensors")
    assert {v.dtype for v in whole.values()} == {torch.bfloat16}
    assert CliRunner().invoke(cli, words).exit_code == 4  # something is there
    sampled = CliRunner().invoke(cli, ["sample", str(tmp_path / "out"), "--max-new-tokens", "4"])
    assert sampled.exit_code == 0, sampled.output


def test_a_difference_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fnlm.interop import parity

    logits = {"max_difference": 0.5, "largest": 3.0, "tolerance": 3e-4}
    said = {"checked": True, "passed": False, "transformers": "0", "logits": logits, "greedy_equal": True}
    said |= {"tokenizer": {"texts": 3, "differing": 2, "first": ["x"]}, "template_equal": True}
    monkeypatch.setattr(parity, "is_possible", lambda: True)
    monkeypatch.setattr(parity, "parity", lambda *_: said)
    run = run_of(tmp_path / "run", model_of())
    result = CliRunner().invoke(cli, ["export", str(run), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "logits differ by 5.0e-01" in result.stderr and "2 of 3 texts have other ids" in result.stderr
    assert json.loads((tmp_path / "out" / "PARITY.json").read_text()) == said


@pytest.mark.slow
@pytest.mark.parametrize(("family", "values"), CASES, ids=NAMES)
def test_both_sides_agree(family: Any, values: dict[str, Any], tmp_path: Path) -> None:
    """Logits, greedy tokens, ids and chats through transformers, for every family."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    from fnlm.interop.parity import parity

    model = model_of(config={"kind": "chat"}, **{**values, "vocab_size": 280})
    said = to_hf(model, tmp_path / "out", check=parity)
    if family.model_type == "qwen2" and int(said["transformers"].partition(".")[0]) >= 5:
        # theirs cuts a text as Qwen's does, whatever tokenizer.json says: that is found, and is all there is
        assert not said["passed"] and said["tokenizer"]["differing"], said
        assert said["greedy_equal"] and said["template_equal"]
    else:
        assert said["passed"], said
    assert said["logits"]["max_difference"] < 1e-4
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 259


def unrounded(theirs: Any, cfg: fnlm.ModelConfig) -> None:
    """What transformers computes in float32 whatever the model's dtype (angles of RoPE, RMSNorm), in float64."""
    from fnlm.rotary import amplitude, frequencies

    def turned(x: torch.Tensor, position_ids: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].double() * frequencies(cfg, torch.device("cpu"))
        both = torch.cat([angles, angles], -1)
        return (both.cos() * amplitude(cfg)).to(x), (both.sin() * amplitude(cfg)).to(x)

    def normed(module: Any, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt() * module.weight

    for module in theirs.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.forward = turned
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(normed, module)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_their_own_files_are_read_as_they_read_them(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A model that transformers made and saved, as it is, and in float64 without what it rounds to float32."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    import transformers

    family = interop.families.BY_ARCHITECTURE[architecture]
    for values in CONFIGS[architecture]:
        cfg = fnlm.ModelConfig(**values)
        described = family.described(cfg)
        config = transformers.AutoConfig.for_model(family.model_type, **described, attn_implementation="sdpa")
        theirs = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
        made = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in theirs.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=made, dtype=dtype))
            theirs.save_pretrained(tmp_path / "a")
            ids = torch.randint(0, cfg.vocab_size, (2, cfg.seq_len), generator=made)
            if dtype == torch.float64:
                unrounded(theirs, cfg)
            want = theirs(ids).logits
        read = interop.read(tmp_path / "a")
        params = read.load()
        assert {k: tuple(v.shape) for k, v in params.items()} == shapes(read.cfg)
        exact = dtype == torch.float64
        torch.testing.assert_close(fnlm.forward(params, ids, read.cfg), want, rtol=0, atol=1e-10 if exact else 1e-5)


@pytest.mark.slow
def test_a_published_model_says_the_same_for_200_tokens(test_data: Path) -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    import transformers

    folder = test_data / "weights" / "stories260K"
    start = torch.tensor([[1, 403, 407, 261, 378]])  # Once upon a time
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    want = loaded.generate(start, max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0)
    for source in (folder, folder / "stories260K.bin"):
        model, ids = interop.read(source), start
        params = model.load()
        for _ in range(200):
            ids = torch.cat([ids, fnlm.forward(params, ids, model.cfg)[:, -1:].argmax(-1)], 1)
        assert torch.equal(ids, want)


def test_weights_in_several_files_and_their_index(tmp_path: Path) -> None:
    model = model_of(**ROPE, norm="rmsnorm", mlp="swiglu")
    to_hf(model, tmp_path / "one")
    run = run_of(tmp_path / "run", model)
    words = ["export", str(run), "--out", str(tmp_path / "many"), "--no-parity", "--shard-size", "20kB"]
    assert CliRunner().invoke(cli, words).exit_code == 0
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in whole.values())
    for name, file in index["weight_map"].items():
        own = load_file(tmp_path / "many" / file)
        assert torch.equal(own[name], whole[name])
        assert len(own) == 1 or sum(v.nbytes for v in own.values()) <= 20_000
    one, many = (interop.read(tmp_path / x).load() for x in ("one", "many"))
    assert all(torch.equal(one[k], many[k]) for k in one)
    assert not (tmp_path / "many" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "size"), [("20kB", 20_000), ("1.5GiB", 3 << 29), ("7", 7), ("2 gb", 2 * 10**9), ("0.5MiB", 1 << 19)]
)
def test_sizes(text: str, size: int) -> None:
    assert shards.size_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "0.1", "2TB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size such as 500MB"):
        shards.size_of(text)


@pytest.mark.parametrize("target", ["hf", "gguf"])
def test_force_replaces_only_what_such_an_export_wrote(target: str, tmp_path: Path) -> None:
    model = model_of(**ROPE, norm="rmsnorm", mlp="swiglu")

    def export(out: Path) -> None:
        to_hf(model, out, force=True) if target == "hf" else interop.to_gguf(model, out, force=True)

    mine, link = tmp_path / "mine", tmp_path / "link"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    link.symlink_to(mine / "thesis.txt")
    for out in (mine, mine / "thesis.txt", link):
        with pytest.raises(CheckpointError, match="choose another --out"):
            export(out)
    assert (mine / "thesis.txt").read_text() == "x" and link.is_symlink()
    for _ in range(2):
        export(tmp_path / "out")
    (tmp_path / "other").symlink_to(tmp_path / "out")
    with pytest.raises(CheckpointError, match="choose another --out"):
        export(tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "mine", "other", "out"]
