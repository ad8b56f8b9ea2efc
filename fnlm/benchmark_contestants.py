"""Who runs in the step benchmark: nanoGPT's model under its own step, and ours; the weights both start from; the peak.

Each function is called by path in a worker that has not imported fnlm, hence the imports inside.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Job = dict[str, Any]
Weights = dict[str, "Tensor"]
Recipe = tuple[Callable[["Tensor", "Tensor"], Any], Callable[[Any], "Tensor"], Callable[[], Iterable["Tensor"]]]

SEED = 1337
LR, BETAS, WEIGHT_DECAY, CLIP = 6e-4, (0.9, 0.95), 0.1, 1.0


def ours(job: Job, weights: Weights | None) -> Recipe:
    """Our step as a user writes it on one device; the options are fields of Compute."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from fnlm import optim, random
    from fnlm.config import Compute, ModelConfig
    from fnlm.losses import make_lm_loss
    from fnlm.machine import route_fp32_to_onednn
    from fnlm.params import init_params
    from fnlm.step import Plan, init_state, make_step
    from fnlm.types import Batch

    if job["device"] == "cpu" and job["precision"] == "fp32":
        route_fp32_to_onednn()
    sizes = {k: v for k, v in job["shape"].items() if k != "batch_size"}
    cfg = ModelConfig(**sizes, norm="layernorm", mlp="gelu", positions="learned", tied=True, bias=False)
    params = init_params(cfg, random.key(SEED))
    if weights is not None:
        theirs = from_nanogpt(weights)
        params = {name: theirs[name] for name in params}
    params = {name: p.to(job["device"]) for name, p in params.items()}
    matrices = {name for name, p in params.items() if p.ndim == 2}  # the yardstick decays its embeddings too
    optimizer = optim.adamw(LR, *BETAS, decay=WEIGHT_DECAY, mask=matrices.__contains__, clip=CLIP)
    plan = Plan(precision=job["precision"])
    state = init_state(params, optimizer, plan, random.key(0))
    train = make_step(make_lm_loss(cfg, Compute(**job["options"])), optimizer, plan)

    def step(batch: Batch) -> Tensor:
        nonlocal state
        state, metrics = train(state, batch)
        return metrics["train/loss"]

    def batch(tokens: Tensor, targets: Tensor) -> Batch:
        return Batch(tokens, targets, (targets >= 0).float())

    return batch, step, lambda: list(state.params.values())


def nanogpt(job: Job, weights: Weights) -> Recipe:
    """The model and optimizer of nanoGPT under the step of its script; options: `compile`, `fused`."""
    import torch

    device, options = job["device"], job["options"]
    if device == "cuda":  # as its script does
        torch.backends.cuda.matmul.allow_tf32 = True
    model = _nanogpt_model(job).to(device)
    model.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]})
    # its script asks for the fused update on CUDA only; naming that device is its one switch for it
    optimizer = model.configure_optimizers(WEIGHT_DECAY, LR, BETAS, "cuda" if options.get("fused") else device)
    forward = torch.compile(model) if options.get("compile") else model
    autocast = job["precision"] == "bf16"

    def step(batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast(device, torch.bfloat16) if autocast else contextlib.nullcontext():
            _, loss = forward(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()  # type: ignore[no-any-return]

    return lambda tokens, targets: (tokens, targets), step, lambda: list(model.parameters())


def _nanogpt_model(job: Job) -> Any:
    import torch

    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(job["against"]) / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up
    spec.loader.exec_module(module)
    torch.manual_seed(SEED)
    shape = job["shape"]
    sizes = {"n_layer": shape["n_layers"], "n_head": shape["n_heads"], "n_embd": shape["d_model"]}
    sizes |= {"block_size": shape["seq_len"], "vocab_size": shape["vocab_size"]}
    return module.GPT(module.GPTConfig(**sizes, bias=False, dropout=0.0))


def write_nanogpt_weights(job: Job) -> int:
    """Write what nanoGPT starts from to the job's `weights`, a safetensors file under its names; returns the count."""
    from safetensors.torch import save_file

    state = _nanogpt_model(job).state_dict()
    del state["lm_head.weight"]  # tied: the file format refuses the same memory twice
    save_file({name: p.contiguous() for name, p in state.items()}, job["weights"])
    return len(state)


def from_nanogpt(state: Weights) -> Weights:
    """The weights of nanoGPT under our names, as views; its `c_attn` (3 D, D) is q, k, v in this order."""
    out = {
        "embed.tokens.weight": state["transformer.wte.weight"],
        "embed.positions.weight": state["transformer.wpe.weight"],
    }
    for i in range(sum(name.endswith(".ln_1.weight") for name in state)):
        theirs, ours = f"transformer.h.{i}.", f"blocks.{i}."
        q, k, v = state[theirs + "attn.c_attn.weight"].chunk(3)
        out[ours + "attn_norm.weight"] = state[theirs + "ln_1.weight"]
        out |= {ours + "attn.q.weight": q, ours + "attn.k.weight": k, ours + "attn.v.weight": v}
        out[ours + "attn.out.weight"] = state[theirs + "attn.c_proj.weight"]
        out[ours + "mlp_norm.weight"] = state[theirs + "ln_2.weight"]
        out[ours + "mlp.up.weight"] = state[theirs + "mlp.c_fc.weight"]
        out[ours + "mlp.down.weight"] = state[theirs + "mlp.c_proj.weight"]
    return out | {"norm.weight": state["transformer.ln_f.weight"]}


def matmul_gflops(job: Job) -> float | None:
    """The best rate in GFLOP/s of a square product in the job's precision; None for a precision nobody can time.

    On a CPU float32 is tried through both of torch's libraries: their rates differ up to twofold on one machine.
    """
    import torch

    cuda: Any = torch.cuda if job["device"] == "cuda" else None
    torch.set_num_threads(job["threads"])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(job["precision"])
    if dtype is None:
        return None
    torch.backends.cuda.matmul.allow_tf32 = True
    n = 8192 if cuda else 2048
    a, b = (torch.randn(n, n, device=job["device"]).to(dtype) for _ in range(2))
    products: list[Callable[[], Any]] = [lambda: a @ b]
    mkldnn: Any = torch.backends.mkldnn
    if not cuda and dtype == torch.float32 and mkldnn.is_available():
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    settle = cuda.synchronize if cuda else lambda: None
    return 2 * n**3 / min(_seconds(product, settle) for product in products) / 1e9


def _seconds(run: Callable[[], Any], settle: Callable[[], None], times: int = 8) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        settle()
        taken.append(time.perf_counter() - start)
    return min(taken)
