"""What is saved comes back bit for bit; what does not fit is explained."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import fnlm
from fnlm import checkpoint, optim, tree
from fnlm.checkpoint import CheckpointError
from fnlm.types import Params, TrainState, Transform

CFG = fnlm.ModelConfig(vocab_size=11, n_layers=2, n_heads=2, d_model=8, seq_len=4, ngrams=((2, 16),), tied=False)
CONFIG = {"model": asdict(CFG)}
OPTIMIZERS: dict[str, Transform] = {
    "sgd": optim.sgd(1e-2, momentum=0.9),
    "adam": optim.adam(1e-3),
    "adamw, bf16 moments": optim.adamw(optim.warmup_cosine(1e-3, 2, 10), moments_dtype=torch.bfloat16, clip=1.0),
    "lion": optim.lion(1e-4),
    "adafactor": optim.adafactor(),
    "muon": optim.muon(0.02, fnlm.is_hidden_matrix, 1e-3, clip=1.0),
    "ema": optim.chain(adam=optim.scale_by_adam(), lr=optim.scale(-1e-3), ema=optim.ema_params(0.9)),
    "value": optim.chain(adam=optim.scale_by_adam(), lr=optim.scale_by_value(1e-3)),
}


def random_state(optimizer: Transform, seed: int = 0, precision: Any = "fp32") -> TrainState:
    """A state with random bits in every tensor: infinities and not-a-numbers among them."""
    params = fnlm.init_params(CFG, fnlm.key(seed))
    state = fnlm.init_state(params, optimizer, fnlm.Plan(precision=precision), fnlm.key(2**63 + seed))
    generator = torch.Generator().manual_seed(seed)

    def scrambled(t: torch.Tensor) -> torch.Tensor:
        shape = (t.numel() * t.element_size(),)
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator).view(t.dtype).reshape(t.shape)

    params, opt_state = tree.map(scrambled, (state.params, state.opt_state))
    return TrainState(torch.tensor(7 + seed), params, opt_state, state.key)


def same_bits(a: Any, b: Any) -> bool:
    x, y = tree.flatten(a), tree.flatten(b)

    def raw(t: torch.Tensor) -> torch.Tensor:
        return t.contiguous().reshape(-1).view(torch.uint8)

    alike = all(x[k].dtype == y[k].dtype and x[k].shape == y[k].shape for k in x.keys() & y.keys())
    return list(x) == list(y) and alike and all(torch.equal(raw(x[k]), raw(y[k])) for k in x)


def save(folder: Path, state: TrainState, **more: Any) -> Path:
    return checkpoint.save(folder, state, config=CONFIG, **more)


@pytest.fixture
def adam(tmp_path: Path) -> tuple[Path, TrainState]:
    state = random_state(OPTIMIZERS["adam"])
    return save(tmp_path / "checkpoints", state, extra={"loss": 1.5}), state


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_comes_back(tmp_path: Path, name: str, precision: str) -> None:
    state = random_state(OPTIMIZERS[name], precision=precision)
    path = save(tmp_path, state)
    back, _ = checkpoint.restore(path, random_state(OPTIMIZERS[name], 1, precision))
    assert same_bits(back, state)
    assert type(back.opt_state) is type(state.opt_state)


def test_a_meta_tensor_describes(adam: tuple[Path, TrainState]) -> None:
    path, state = adam
    like = tree.map(lambda t: t.to("meta"), state)
    assert same_bits(checkpoint.restore(path, like)[0], state)


def test_other_dtypes_strides_and_sizes(tmp_path: Path) -> None:
    params: Params = {
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "part": torch.arange(10.0)[::3],
        "empty": torch.empty(0, 3),
        "byte": torch.tensor([1, 255], dtype=torch.uint8),
        "yes": torch.tensor([True, False, True]),
        "double": torch.tensor(0.1, dtype=torch.float64),
        "small": torch.ones(3, dtype=torch.float8_e4m3fn),
        "wörd/x": torch.ones(1, dtype=torch.bfloat16),
    }
    state = TrainState(torch.tensor(0), params, (), fnlm.key(0))
    path = save(tmp_path, state)
    assert same_bits(checkpoint.restore(path, state)[0], state)
    plain = safetensors.torch.load_file(path / "params.safetensors")
    assert same_bits({k: plain[k] for k in params}, params)


def test_large_files_are_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.files, "CHUNK", 100)
    state = random_state(OPTIMIZERS["adam"])
    assert same_bits(checkpoint.restore(save(tmp_path, state), state)[0], state)


def test_the_layout(tmp_path: Path) -> None:
    state = random_state(OPTIMIZERS["adam"])
    (tmp_path / "t.json").write_text("{}")
    path = save(tmp_path / "checkpoints", state, tokenizer=tmp_path / "t.json", extra={"loss": 2.0})
    names = ["COMMITTED", "MANIFEST.json", "config.json", "opt_state.safetensors"]
    assert sorted(p.name for p in path.iterdir()) == [*names, "params.safetensors", "tokenizer.json", "tree.json"]
    assert path == tmp_path / "checkpoints" / "00000007"
    assert (path.parent / "latest").read_text() == "00000007\n"
    assert (path / "tokenizer.json").read_text() == "{}"
    assert json.loads((path / "config.json").read_text()) == json.loads(json.dumps(CONFIG))
    about = checkpoint.describe(path)
    assert (about["step"], about["key"], about["extra"]) == (7, state.key.tolist(), {"loss": 2.0})
    assert list(about["tensors"]) == list(tree.flatten({"params": state.params, "opt_state": state.opt_state}))
    paths = safetensors.torch.load_file(path / "opt_state.safetensors")
    assert "opt_state/adam/mu/blocks.0.attn.q.weight" in paths
    checkpoint.verify(path)


def test_load_params(tmp_path: Path) -> None:
    state = random_state(OPTIMIZERS["muon"])
    path = save(tmp_path / "run" / "checkpoints", state, extra={"val_loss": 1.0})
    for given in (path, path.parent, tmp_path / "run", str(path)):
        cfg, params, extra = checkpoint.load_params(given)
        assert (cfg, extra) == (CFG, {"val_loss": 1.0})
        assert list(params) == list(state.params)
        assert same_bits(params, state.params)


def test_parameters_alone(tmp_path: Path) -> None:
    state = random_state(OPTIMIZERS["adam"])
    whole = save(tmp_path, state)
    alone = save(tmp_path, state, what="params")
    assert alone.name == "00000007.params"
    assert not (alone / "opt_state.safetensors").exists()
    assert (tmp_path / "latest").read_text() == "00000007\n"
    assert checkpoint.newest_good(tmp_path) == whole
    assert checkpoint.newest_good(tmp_path, "params") == alone
    assert same_bits(checkpoint.load_params(alone)[1], state.params)
    with pytest.raises(CheckpointError, match="without the optimizer: start from it with load_params"):
        checkpoint.restore(alone, state)


def test_extra_is_json(tmp_path: Path) -> None:
    state = random_state(OPTIMIZERS["sgd"])
    extra = {"loss": torch.tensor(0.5), "nan": float("nan"), "path": Path("a/b"), "list": (1, 2), "cfg": CFG}
    back = checkpoint.restore(save(tmp_path, state, extra=extra), state)[1]
    assert back == {**extra, "loss": 0.5, "nan": None, "path": "a/b", "list": [1, 2], "cfg": back["cfg"]}
    assert back["cfg"]["ngrams"] == [[2, 16]]
    with pytest.raises(CheckpointError, match=r"extra\.extra\.a is a set, which JSON cannot hold"):
        save(tmp_path, state, extra={"a": {1}})


def test_the_table_of_differences(tmp_path: Path) -> None:
    opt = OPTIMIZERS["sgd"]
    state = random_state(opt)
    path = save(tmp_path, state)
    other = dict(state.params)
    del other["norm.weight"]
    other["new.weight"] = torch.zeros(3, 2)
    other["head.weight"] = torch.zeros(12, 8)
    other["embed.tokens.weight"] = other["embed.tokens.weight"].double()
    with pytest.raises(CheckpointError) as error:
        checkpoint.restore(path, state._replace(params=other))
    rows = [line.split() for line in str(error.value).splitlines()[1:-1]]
    assert "does not fit: 4 differences" in str(error.value)
    assert sorted(rows) == sorted(
        [
            ["missing", "params/new.weight", "wanted", "3x2", "float32"],
            ["extra", "params/norm.weight", "saved", "8", "float32"],
            ["shape", "params/head.weight", "saved", "11x8", "float32,", "wanted", "12x8", "float32"],
            ["dtype", "params/embed.tokens.weight", "saved", "11x8", "float32,", "wanted", "11x8", "float64"],
        ]
    )


def test_a_deeper_model_refuses(tmp_path: Path) -> None:
    path = save(tmp_path, random_state(OPTIMIZERS["adam"]))
    deep = fnlm.init_params(fnlm.override(CFG, n_layers=9), fnlm.key(0))
    like = fnlm.init_state(deep, OPTIMIZERS["adam"])
    with pytest.raises(CheckpointError, match=r"and \d+ more\n"):
        checkpoint.restore(path, like)
    with pytest.raises(CheckpointError, match="opt_state/trace"):
        checkpoint.restore(path, random_state(OPTIMIZERS["sgd"]))


def test_partial(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state, like = random_state(OPTIMIZERS["sgd"]), random_state(OPTIMIZERS["sgd"], 1)
    path = save(tmp_path, state, extra={"a": 1})
    like = like._replace(params={**like.params, "head.weight": torch.ones(12, 8)})
    back, extra = checkpoint.restore(path, like, partial=True)
    assert extra == {"a": 1, "skipped": ["params/head.weight"]}
    assert "shape    params/head.weight" in caplog.text
    assert same_bits(back, state._replace(params={**state.params, "head.weight": like.params["head.weight"]}))
    assert back.params["head.weight"] is not like.params["head.weight"]
    meta = tree.map(lambda t: t.to("meta"), like)
    with pytest.raises(CheckpointError, match="it is on the meta device"):
        checkpoint.restore(path, meta, partial=True)


def test_what_cannot_be_read(tmp_path: Path, adam: tuple[Path, TrainState]) -> None:
    _, state = adam
    with pytest.raises(CheckpointError, match="is not a folder"):
        checkpoint.restore(tmp_path / "nowhere", state)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no complete checkpoint to resume from"):
        checkpoint.restore(tmp_path / "empty", state)
    assert checkpoint.newest_good(tmp_path / "nowhere") is None
    other = checkpoint.save(tmp_path / "b", state, config={"model": {**asdict(CFG), "n_layer": 1}})
    with pytest.raises(CheckpointError, match="no field 'n_layer'; did you mean 'n_layers'"):
        checkpoint.load_params(other)
    bare = checkpoint.save(tmp_path / "c", state, config={})
    with pytest.raises(CheckpointError, match="has no 'model'"):
        checkpoint.load_params(bare)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    def state(opt_state: Any) -> TrainState:
        return TrainState(torch.tensor(0), {"w": torch.ones(1)}, opt_state, fnlm.key(0))

    with pytest.raises(CheckpointError, match="complex64"):
        save(tmp_path, state({"x": torch.ones(1, dtype=torch.complex64)}))
    with pytest.raises(CheckpointError, match="the same path"):
        save(tmp_path, state({"a/b": torch.ones(1), "a": {"b": torch.ones(1)}}))
    with pytest.raises(CheckpointError, match="choose 'all' or 'params'"):
        save(tmp_path, state(()), what="some")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot save"):
        save(tmp_path / "file", state(()))


def test_a_format_of_the_future(adam: tuple[Path, TrainState]) -> None:
    path, state = adam
    manifest = json.loads((path / "MANIFEST.json").read_text())
    (path / "MANIFEST.json").write_text(json.dumps({**manifest, "format": 3}))
    digest = checkpoint.files.file_sha256(path / "MANIFEST.json")
    (path / "COMMITTED").write_text(digest + "\n")
    with pytest.raises(CheckpointError, match="has format 3, this fnlm reads up to 2"):
        checkpoint.restore(path, state)
