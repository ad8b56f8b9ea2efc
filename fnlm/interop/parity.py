"""Both sides run and compared: an exported folder through transformers, and the model it was made of."""

from __future__ import annotations

import importlib.util
import math
import random as stdlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fnlm.config import Compute, ModelConfig
from fnlm.data import prompt
from fnlm.forward import forward
from fnlm.interop.export import Model
from fnlm.interop.outward import CHATML
from fnlm.tokenizers import Char, Tokenizer
from fnlm.types import Params

TOLERANCE, USUAL = 1e-4, 10.0  # of logits up to the usual size; of larger ones in proportion
PROMPTS, GREEDY, TEXTS = 3, 16, 300
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi! Größe 😀?\n"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And?"},
]
_RANGES: tuple[tuple[int, int], ...] = (
    (0x20, 0x7F),
    (0xA0, 0x24F),
    (0x370, 0x52F),
    (0x5D0, 0x6FF),
    (0x900, 0x97F),
    (0x3040, 0x30FF),
)
_RANGES += ((0x4E00, 0x4FFF), (0xAC00, 0xACFF), (0x1F300, 0x1F64F), (0x2000, 0x206F), (0x300, 0x36F), (0x9, 0xE))


def is_possible() -> bool:
    """Whether transformers is installed."""
    return importlib.util.find_spec("transformers") is not None


@torch.no_grad()
def parity(folder: Path, model: Model) -> dict[str, Any]:
    """What both sides make of the same prompts, texts and conversations; `passed` where they agree.

    Computed in float32. Greedy tokens are those of the likeliest next one, over and over.
    """
    import transformers

    cfg, params = model.cfg, {name: p.float() for name, p in model.params.items()}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    worst, largest, same = 0.0, 0.0, True
    for ids in prompts(cfg, model.tokenizer):
        ours, other = forward(params, ids, cfg, compute=Compute(kernels="plain")), loaded(ids).logits
        worst = max(worst, float((ours - other).abs().max()))
        largest = max(largest, float(other.abs().max()))
        start = ids[:, : max(1, min(8, cfg.seq_len // 2))]
        same &= torch.equal(greedy(params, start, cfg), _greedy(loaded, start, cfg))
    differing = [text for text in texts(model.tokenizer) if _ids(theirs, text) != model.tokenizer.encode(text)]
    found = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "logits": {"max_difference": worst, "largest": largest, "tolerance": TOLERANCE * max(1.0, largest / USUAL)},
        "greedy_equal": same,
        "tokenizer": {"texts": TEXTS, "differing": len(differing), "first": differing[:1]},
        "template_equal": templates_equal(theirs, model),
    }
    near = math.isfinite(worst) and worst <= TOLERANCE * max(1.0, largest / USUAL)
    return {"checked": True, "passed": bool(near and same and not differing and found["template_equal"]), **found}


def prompts(cfg: ModelConfig, tokenizer: Tokenizer) -> list[Tensor]:
    """Random ids of the tokenizer, (1, T), of several lengths up to the context's (at most 256)."""
    made, most = torch.Generator().manual_seed(0), min(cfg.seq_len, 256)
    lengths = [max(1, most * i // PROMPTS) for i in range(1, PROMPTS + 1)]
    return [torch.randint(0, min(tokenizer.vocab_size, cfg.vocab_size), (1, n), generator=made) for n in lengths]


def greedy(params: Params, ids: Tensor, cfg: ModelConfig) -> Tensor:
    """The ids with the likeliest next one appended, over and over, until there are GREEDY more or the context ends."""
    for _ in range(min(GREEDY, cfg.seq_len - ids.shape[1])):
        ids = torch.cat([ids, forward(params, ids, cfg)[:, -1:].argmax(-1)], 1)
    return ids


def _greedy(loaded: Any, ids: Tensor, cfg: ModelConfig) -> Tensor:
    for _ in range(min(GREEDY, cfg.seq_len - ids.shape[1])):
        ids = torch.cat([ids, loaded(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


def texts(tokenizer: Tokenizer) -> list[str]:
    """Random Unicode of many scripts; of a character tokenizer's own characters. The same every time."""
    draw = stdlib.Random(0)

    def character() -> str:
        if isinstance(tokenizer, Char):
            return draw.choice(tokenizer.characters)
        return chr(draw.randrange(*draw.choice(_RANGES))) if draw.random() > 0.3 else draw.choice(" \n etaoin'0123")

    return ["".join(character() for _ in range(draw.randrange(1, 60))) for _ in range(TEXTS)]


def _ids(theirs: Any, text: str) -> list[int]:
    found: list[int] = theirs.encode(text, add_special_tokens=False)
    return found


def templates_equal(theirs: Any, model: Model) -> bool:
    """Whether a conversation becomes the ids that the model was trained on; of a foreign template, whether it came."""
    kept = model.config.get("interop", {}).get("template")
    if kept is not None:
        return bool(theirs.chat_template == kept)
    if theirs.chat_template != CHATML:
        return theirs.chat_template is None
    text = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    rendered: list[int] = theirs.encode(text, add_special_tokens=False)
    return rendered == prompt(model.tokenizer, TALK)
