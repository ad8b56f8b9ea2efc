"""Full-size random models of each family through transformers and back: logits, and files byte for byte.

    python benchmarks/round_trip.py [--families gpt2,llama,gpt_neox,stablelm] [--tokens 128] [--threads N]

Needs transformers. It makes and saves a model with random parameters (none of them 0 or 1); fnlm reads the folder,
computes the same logits, and writes its own, which transformers reads again. Printed for each: the largest difference
of logits in float32; in float64 as transformers computes (its angles of RoPE and its RMSNorm stay float32); in float64
with these in float64 too; whether model.safetensors is the same bytes; and the logits of the folder that came back,
through transformers, against those of the one that left. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import fnlm
from fnlm import interop, tokenizers
from fnlm.interop.families import FAMILIES
from fnlm.rotary import amplitude, frequencies

SIZE = {"n_layers": 12, "n_heads": 12, "d_model": 768, "seq_len": 1024, "vocab_size": 50257}
ROPE = {**SIZE, "positions": "rope", "tied": False, "vocab_size": 50304}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {**SIZE, "bias": True, "mlp": "gelu-tanh"},
    "llama": {
        **SIZE, "n_layers": 30, "n_heads": 9, "n_kv_heads": 3, "d_model": 576, "d_ff": 1536, "vocab_size": 49152,
        "positions": "rope", "norm": "rmsnorm", "mlp": "swiglu", "seq_len": 2048,
    },
    "gpt_neox": {**ROPE, "bias": True, "rope_fraction": 0.25, "parallel_residual": True},
    "stablelm": {**ROPE, "mlp": "swiglu", "norm_bias": True, "rope_fraction": 0.25, "d_ff": 2048},
}  # fmt: skip


def unrounded(theirs: Any, cfg: fnlm.ModelConfig) -> None:
    """Angles and RMSNorm in the dtype of the model."""

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


@torch.no_grad()
def measured(name: str, folder: Path, tokens: int) -> dict[str, Any]:
    family, cfg = next(f for f in FAMILIES if f.model_type == name), fnlm.ModelConfig(**SHAPES[name])
    made = torch.Generator().manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **family.described(cfg), attn_implementation="sdpa")
    theirs = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for p in theirs.parameters():
        p.add_(0.02 * torch.randn(p.shape, generator=made))
    theirs.save_pretrained(folder / "out")
    ids = torch.randint(0, cfg.vocab_size, (2, tokens), generator=made)
    want = theirs(ids).logits

    model = interop.read(folder / "out")
    params = model.load()
    kept = {"kind": "text", "interop": {"format": "hf", "kept": dict(model.kept)}}
    interop.to_hf(interop.Model(model.cfg, params, tokenizers.named("byte"), kept), folder / "back")
    both = [(folder / side / "model.safetensors").read_bytes() for side in ("out", "back")]
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "back").float().eval()
    row = {
        "family": name,
        "parameters": fnlm.count(model.cfg),
        "largest_logit": float(want.abs().max()),
        "float32": differing(fnlm.forward(params, ids, model.cfg), want),
        "same_bytes": both[0] == both[1],
        "back": differing(again(ids).logits, want),
    }
    del both, again
    wide, theirs = {k: v.double() for k, v in params.items()}, theirs.double()
    ours = fnlm.forward(wide, ids, model.cfg)
    row["float64_as_it_is"] = differing(ours, theirs(ids).logits)
    unrounded(theirs, model.cfg)
    return row | {"float64": differing(ours, theirs(ids).logits)}


def differing(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(SHAPES))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.families.split(","):
        with tempfile.TemporaryDirectory() as folder:
            row = measured(name, Path(folder), args.tokens)
        rows.append(row)
        print(
            f"{name} ({row['parameters'] / 1e6:.0f} M, logits to {row['largest_logit']:.0f}): float32 "
            f"{row['float32']:.1e}, float64 {row['float64_as_it_is']:.1e}, without its float32 parts "
            f"{row['float64']:.1e}, same bytes {row['same_bytes']}, back {row['back']:.1e}"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
