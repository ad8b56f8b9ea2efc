"""Real weights: two trained models of other people give their authors' logits."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fnlm
from fnlm import interop
from fnlm.params import shapes


def model(folder: Path) -> tuple[fnlm.ModelConfig, fnlm.Params]:
    found = interop.read(folder)
    return found.cfg, found.load()


@pytest.fixture(scope="module")
def sorter(test_data: Path) -> tuple[Path, fnlm.ModelConfig, fnlm.Params]:
    folder = test_data / "weights" / "mingpt-nano-sort"
    return folder, *model(folder)


@pytest.fixture(scope="module")
def teller(test_data: Path) -> tuple[Path, fnlm.ModelConfig, fnlm.Params]:
    folder = test_data / "weights" / "stories260K"
    return folder, *model(folder)


@pytest.mark.parametrize("kernels", ["auto", "plain", "sdpa"])
def test_gpt2_logits(sorter: tuple[Path, fnlm.ModelConfig, fnlm.Params], kernels: Any) -> None:
    folder, cfg, params = sorter
    assert {k: tuple(v.shape) for k, v in params.items()} == shapes(cfg)
    published = load_file(folder / "reference-partials.safetensors")
    got = fnlm.forward(params, published["idx"].long(), cfg, compute=fnlm.Compute(kernels=kernels))
    torch.testing.assert_close(got, published["lm_head"], rtol=0, atol=1e-5)


def sorted_by(model: tuple[Path, fnlm.ModelConfig, fnlm.Params], letters: Tensor) -> Tensor:
    _, cfg, params = model
    n = letters.shape[1]
    for _ in range(n):
        letters = torch.cat([letters, fnlm.forward(params, letters, cfg)[:, -1:].argmax(-1)], 1)
    return letters[:, n:]


def test_the_sorting_model_sorts_all_inputs(sorter: tuple[Path, fnlm.ModelConfig, fnlm.Params]) -> None:
    inputs = torch.tensor(list(itertools.product(range(3), repeat=6)))
    assert len(inputs) == 729
    assert torch.equal(sorted_by(sorter, inputs), inputs.sort(-1).values)


@pytest.mark.parametrize("kernels", ["auto", "plain", "sdpa"])
def test_llama_logits(teller: tuple[Path, fnlm.ModelConfig, fnlm.Params], kernels: Any) -> None:
    folder, cfg, params = teller
    assert {k: tuple(v.shape) for k, v in params.items()} == shapes(cfg)
    assert (cfg.n_heads, cfg.kv_heads) == (8, 4)
    reference = load_file(folder / "reference-logits.safetensors")
    got = fnlm.forward(params, reference["input_ids"][None], cfg, compute=fnlm.Compute(kernels=kernels))[0]
    # Logits reach 20, and the reference, itself computed in float32, is 3.4e-5 from what float64 gives.
    torch.testing.assert_close(got, reference["logits"], rtol=0, atol=5e-5)


def test_llama_tells_its_story_better_than_chance(teller: tuple[Path, fnlm.ModelConfig, fnlm.Params]) -> None:
    folder, cfg, params = teller
    ids = load_file(folder / "reference-logits.safetensors")["input_ids"][None]
    batch = fnlm.Batch(ids[:, :-1], ids[:, 1:], torch.ones(1, 63))
    assert float(fnlm.lm_loss(params, batch, cfg)) < 3  # a uniform guess costs log(512) = 6.2
