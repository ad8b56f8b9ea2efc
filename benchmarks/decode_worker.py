"""One contestant of benchmarks/decode_peers.py: a process that loads a model and answers lines of JSON on stdin.

{"prompts": [[ids], ...], "tokens": n}   ->  {"seconds": of all, greedily, n tokens each}
{"read": bytes}                           ->  {"seconds": of a sum over so many bytes}
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Write = Callable[[list[list[int]], int], None]


def ours(model: str, kind: str) -> Write:
    import torch

    import fnlm
    from fnlm import random, trained
    from fnlm.decode import prepare
    from fnlm.generate import generate
    from fnlm.machine import route_fp32_to_onednn
    from fnlm.quantize import quantize
    from fnlm.sampling import Settings

    if model in fnlm.PRESETS:
        cfg = fnlm.PRESETS[model]
        params = fnlm.init_params(cfg, fnlm.key(0))
    else:
        cfg, params = trained.load(model)[:2]
    route_fp32_to_onednn()  # as the server does
    if kind.startswith("int"):
        params = quantize({name: p.to(torch.bfloat16) for name, p in params.items()}, 8 if kind == "int8" else 4)
    ready = prepare(params, cfg, torch.float32 if kind == "fp32" else torch.bfloat16, donate=True)  # as it does too

    def write(prompts: list[list[int]], tokens: int) -> None:
        settings = Settings(temperature=0, max_tokens=tokens, min_tokens=tokens)
        if len(prompts) == 1:
            steps = generate(ready, cfg, prompts, settings, random.key(0), eot_ids=frozenset())
            assert sum(len(step) for step in steps) == tokens
        else:
            served(ready, cfg, prompts, settings)

    return write


def served(ready: Any, cfg: Any, prompts: list[list[int]], settings: Any) -> None:
    """All at once, as `fnlm serve` writes them."""
    from fnlm.tokenizers import named
    from webui.batch import SHORT, Batch
    from webui.writing import Writer, chosen

    batch, tokenizer = Batch(ready, cfg, len(prompts)), named("byte")
    running = {batch.join(p): Writer(tokenizer, p, settings, 0, cfg.vocab_size) for p in prompts}

    def push(slots: list[Any], logits: Any) -> None:
        for slot, token, score in zip(slots, *chosen([running[slot] for slot in slots], logits), strict=True):
            running[slot].push(token, score)

    while running:
        new = {slot: w.next for slot, w in running.items() if w.next is not None}
        if new:
            push(*batch.advance(new))
        for slot, row in batch.fill(SHORT):
            push([slot], row[None])
        for slot in [slot for slot, w in running.items() if w.finish]:
            batch.leave(slot)
            del running[slot]


def transformers(model: str, kind: str) -> Write:
    import torch
    import transformers as hf

    hf.logging.set_verbosity_error()
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    if model == "gpt2":
        net = hf.GPT2LMHeadModel(hf.GPT2Config()).to(dtype)
    else:
        net = hf.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    net = net.eval()

    def write(prompts: list[list[int]], tokens: int) -> None:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            out = net.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0
            )
        assert out.shape[1] == longest + tokens

    return write


def llama(model: str, kind: str, threads: int) -> Write:
    import llama_cpp
    import numpy as np

    path = Path(model).with_suffix(f".{kind}.gguf")
    if not path.exists():
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = {"bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16, "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}[kind]
        assert llama_cpp.llama_model_quantize(model.encode(), str(path).encode(), options) == 0
    net = llama_cpp.Llama(
        str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False, logits_all=False
    )

    def write(prompts: list[list[int]], tokens: int) -> None:
        (prompt,) = prompts
        net.reset()
        net.eval(prompt)
        for i in range(tokens):
            row = llama_cpp.llama_get_logits_ith(net.ctx, -1)
            token = int(np.argmax(np.ctypeslib.as_array(row, (net.n_vocab(),))))
            if i + 1 < tokens:
                net.eval([token])

    return write


def gpt2_file(to: str) -> None:
    """GPT-2's shape with random weights for llama.cpp, whose tokens are their numbers."""
    import gguf
    import numpy as np
    import transformers as hf

    cfg = hf.GPT2Config()
    state = {k: v.numpy() for k, v in hf.GPT2LMHeadModel(cfg).state_dict().items()}
    out = gguf.GGUFWriter(to, "gpt2")
    out.add_context_length(cfg.n_positions)
    out.add_embedding_length(cfg.n_embd)
    out.add_feed_forward_length(4 * cfg.n_embd)
    out.add_block_count(cfg.n_layer)
    out.add_head_count(cfg.n_head)
    out.add_layer_norm_eps(cfg.layer_norm_epsilon)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list([f"t{i}" for i in range(cfg.vocab_size)])
    out.add_token_types([1] * cfg.vocab_size)
    out.add_token_merges(["t 0"])
    out.add_bos_token_id(cfg.vocab_size - 1)
    out.add_eos_token_id(cfg.vocab_size - 1)
    names = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    inner = {"ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
             "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}  # fmt: skip
    for name, w in state.items():
        base, _, what = name.removeprefix("transformer.").rpartition(".")
        if base.startswith("h."):
            _, i, own = base.split(".", 2)
            base, w = f"blk.{i}.{inner[own]}", w.T if w.ndim == 2 else w
        elif base in names:
            base = names[base]
        else:
            continue  # the tied head
        out.add_tensor(f"{base}.{what}", np.ascontiguousarray(w, dtype=np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def main() -> None:
    who, kind, model, threads = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    if who == "gpt2-file":
        gpt2_file(model)
        return
    if who != "llama":
        import torch

        torch.set_num_threads(threads)
    write = llama(model, kind, threads) if who == "llama" else {"fnlm": ours, "hf": transformers}[who](model, kind)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "read" in asked:
            big = torch.ones(asked["read"] // 4)
            began = min(_timed(big.sum) for _ in range(5))
            del big
        else:
            began = _timed(lambda asked=asked: write(asked["prompts"], asked["tokens"]))
        print(json.dumps({"seconds": began}), flush=True)


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
