"""Adapters in peft's files: the same logits as ours, on a base in Hugging Face's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fnlm
from fnlm import lora
from fnlm.checkpoint import CheckpointError
from fnlm.interop import to_peft
from fnlm.interop.families import FAMILIES, Family
from fnlm.interop.peft import modules
from tests.interop.foreign_folders import CASES, CONFIGS, NAMES, params_of, written


def adapters_of(params: fnlm.Params, rank: int, targets: str = "*") -> fnlm.Params:
    """Adapters that change something."""
    made = torch.Generator().manual_seed(2)
    fresh = lora.init(params, rank, fnlm.key(0), targets)
    return {k: 0.3 * torch.randn(x.shape, generator=made) for k, x in fresh.items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", ["*", "q,v,down"])
@pytest.mark.parametrize(("family", "values"), CASES, ids=NAMES)
def test_peft_computes_the_same(family: Family, values: dict[str, Any], targets: str, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    cfg, params = written(tmp_path / "base", family, values)
    adapters = adapters_of(params, 3, targets)
    to_peft(cfg, adapters, 3, 1.5, str(tmp_path / "base"), tmp_path / "adapters")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").float()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
    ids = torch.randint(0, cfg.vocab_size, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours = fnlm.forward(lora.merge({**params, **adapters}, 1.5), ids, cfg)  # theirs are not merged
        plain = fnlm.forward(params, ids, cfg)
        assert (theirs(ids).logits - ours).abs().max() <= 1e-5 * max(1.0, float(ours.abs().max()))
        assert (plain - ours).abs().max() > 1e-2


@pytest.mark.parametrize(("family", "count"), [(f, 7 if "Llama" in f.architecture else 4) for f in FAMILIES[:2]])
def test_each_module_has_its_adapters(family: Family, count: int, tmp_path: Path) -> None:
    """GPT-2's q, k and v are one module of three times the rank; what has none is zero there."""
    cfg, params = written(tmp_path / "base", family, CONFIGS[family.architecture][0])
    found = list(modules(cfg, adapters_of(params, 3)))
    assert len(found) == count * cfg.n_layers
    joint = [m for m in found if m.name.endswith("c_attn")]
    assert {tuple(m.a.shape) for m in joint} <= {(9, cfg.d_model)}
    assert bool(joint) == (family.architecture == "GPT2LMHeadModel")
    for m in modules(cfg, adapters_of(params, 3, "k")):
        assert m.a.shape == (3, cfg.d_model)
        assert bool(m.b.any())
        if m.name.endswith("c_attn"):
            assert not m.b[: cfg.d_model].any()
            assert not m.b[2 * cfg.d_model :].any()


def test_only_adapters_are_replaced(tmp_path: Path) -> None:
    cfg = fnlm.ModelConfig(**CONFIGS["LlamaForCausalLM"][0])
    adapters = adapters_of(params_of(cfg), 2)
    to_peft(cfg, adapters, 2, 2.0, "base", tmp_path / "out")
    about = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["base_model_name_or_path"]) == (2, 4.0, "base")
    with pytest.raises(CheckpointError, match="exists; choose another --out"):
        to_peft(cfg, adapters, 2, 2.0, "base", tmp_path / "out")
    to_peft(cfg, adapters, 2, 2.0, "other", tmp_path / "out", force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="holds no adapters"):
        to_peft(cfg, adapters, 2, 2.0, "base", tmp_path / "mine", force=True)
