"""How many held-out questions of the demo world a model answers, against steps and seconds.

    python benchmarks/demo_world.py --seconds 200 [model field=value ...] [--train field=value] [--tune field=value]

The preset is pretrained on stories, then finetuned on chats with the loss on the assistant's words only, with one token
a word. `--seconds` is for both together: a few steps are timed first, and the preset's counts of steps shrink or grow
alike. Without it they are as in the preset. The JSON line at the end has the share of right answers, overall and per
kind; losses are in nats per token, that of pretraining beside the entropy of the text.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator

import torch

import fnlm
from fnlm import world
from fnlm.presets import optimizer_of

END, START, STOP, LINE = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "\n"
FOREVER = 1 << 40
Ids = list[tuple[int, int]]  # token, and whether it is learnt
Maker = Callable[[int], fnlm.Batch]


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def vocabulary() -> dict[str, int]:
    """A number for every word of the world; the text is long enough that each occurs."""
    texts = [*world.stories(0, 2000), *(m["content"] for chat in world.chats(0, 20_000) for m in chat)]
    known = sorted({w for text in texts for w in words(text)} | {"user", "assistant"})
    return {w: i for i, w in enumerate([END, START, STOP, LINE, *known])}


def story_ids(text: str, ids: dict[str, int]) -> Ids:
    return [(ids[w], 1) for w in [*words(text), END]]


def told_ids(question: world.Question, ids: dict[str, int]) -> Ids:
    """A question as stories ask it."""
    return story_ids(question.messages[-1]["content"], ids)[:-1]


def chat_ids(messages: list[dict[str, str]], ids: dict[str, int], reply: bool = False) -> Ids:
    """ChatML, learnt where the assistant speaks; with `reply` it ends where the assistant begins."""
    out: list[tuple[str, int]] = []
    for m in messages:
        learnt = int(m["role"] == "assistant")
        out += [(w, 0) for w in (START, m["role"], LINE)]
        out += [(w, learnt) for w in (*words(m["content"]), STOP)] + [(LINE, 0)]
    out += [(w, 0) for w in (START, "assistant", LINE)] if reply else [(END, 0)]
    return [(ids[w], learnt) for w, learnt in out]


def streamed(documents: Iterable[Ids], t: int, rows: int) -> Maker:
    """Batches cut from one long row of documents, each token once; the maker keeps its place, so step is not read."""
    flat = (pair for document in documents for pair in document)

    def make(step: int) -> fnlm.Batch:
        pairs = torch.tensor([next(flat) for _ in range(rows * t + 1)])
        tokens, learnt = pairs.unbind(1)
        return fnlm.Batch(tokens[:-1].view(rows, t), tokens[1:].view(rows, t), learnt[1:].view(rows, t).float())

    return make


def padded(documents: Iterator[Ids], t: int, rows: int) -> Maker:
    """Batches of whole documents, as many to a row as fit."""
    rest: list[Ids] = []

    def row() -> Ids:
        out: Ids = []
        while True:
            document = rest.pop() if rest else next(documents)
            if len(out) + len(document) > t + 1:
                rest.append(document[: t + 1] if not out else document)
                if out:
                    return out + [(0, 0)] * (t + 1 - len(out))
            out += document if not rest else rest.pop()

    def make(step: int) -> fnlm.Batch:
        pairs = torch.tensor([row() for _ in range(rows)])
        tokens, learnt = pairs.unbind(2)
        return fnlm.Batch(tokens[:, :-1], tokens[:, 1:], learnt[:, 1:].float())

    return make


@torch.no_grad()
def answers(params: fnlm.Params, cfg: fnlm.ModelConfig, prompts: list[Ids], ids: dict[str, int]) -> list[str]:
    """The likeliest words after each prompt, until the assistant stops."""
    live = {k: v.to(torch.bfloat16) for k, v in params.items()}
    names, t = list(ids), cfg.seq_len
    rows = torch.zeros(len(prompts), t, dtype=torch.long)
    at = torch.tensor([len(p) for p in prompts])
    for i, p in enumerate(prompts):
        rows[i, : len(p)] = torch.tensor([token for token, _ in p])
    said: list[list[str]] = [[] for _ in prompts]
    for _ in range(14):
        spans = rows.split(64)
        logits = torch.cat(
            [fnlm.forward(live, x, cfg)[torch.arange(len(x)), a - 1] for x, a in zip(spans, at.split(64), strict=True)]
        )
        best = logits.argmax(-1)
        for i, token in enumerate(best.tolist()):
            said[i].append(names[token])
        rows[torch.arange(len(rows)), at.clamp(max=t - 1)] = best
        at = (at + 1).clamp(max=t)
    return [" ".join(" ".join(s).split(STOP)[0].split()) for s in said]


def held_out(
    params: fnlm.Params, cfg: fnlm.ModelConfig, asked: list[world.Question], ids: dict[str, int], chat: bool
) -> dict[str, float]:
    prompts = [chat_ids(q.messages, ids, reply=True) if chat else told_ids(q, ids) for q in asked]
    said = [text.split(" .")[0] for text in answers(params, cfg, prompts, ids)]
    return {kind: round(share, 3) for kind, share in world.score(said, asked).items()}


def train(
    params: fnlm.Params, cfg: fnlm.ModelConfig, config: fnlm.TrainConfig, make: Maker, seed: int,
    every: Callable[[int, float, fnlm.Params], None], stop: int | None = None,
) -> fnlm.Params:  # fmt: skip
    """Parameters after `config.steps` steps, or the first `stop` of them; `every` hears of 8 moments on the way."""
    optimizer, plan = optimizer_of(config, cfg), fnlm.Plan(precision=config.precision)
    step = fnlm.make_step(fnlm.make_lm_loss(cfg), optimizer, plan)
    state = fnlm.init_state(params, optimizer, plan, fnlm.key(seed))
    losses: list[torch.Tensor] = []
    for i in range(config.steps if stop is None else stop):
        state, metrics = step(state, make(i))
        losses.append(metrics["train/loss"])
        if stop is None and (i + 1) % max(config.steps // 8, 1) == 0:
            every(i + 1, float(torch.stack(losses).mean()), state.params)
            losses = []
    return state.params


def step_seconds(cfg: fnlm.ModelConfig, config: fnlm.TrainConfig, make: Maker, steps: int = 20) -> float:
    """Seconds a step, batch and all, after the first few."""
    params = fnlm.init_params(cfg, fnlm.key(0))
    train(params, cfg, config, make, 0, lambda *_: None, stop=5)
    began = time.perf_counter()
    train(params, cfg, config, make, 0, lambda *_: None, stop=steps)
    return (time.perf_counter() - began) / steps


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    fnlm.tune_cpu()
    ids = vocabulary()
    cfg = fnlm.override(fnlm.PRESETS["demo"], vocab_size=len(ids), **dict(pair(x) for x in args.fields))
    first = fnlm.override(fnlm.TRAINING["demo"], **dict(pair(x) for x in args.train))
    second = fnlm.override(fnlm.FINETUNING["demo"], **dict(pair(x) for x in args.tune))
    stories = (story_ids(text, ids) for text in world.stories(2 * args.seed, FOREVER))
    chats = (chat_ids(chat, ids) for chat in world.chats(2 * args.seed, FOREVER))
    pack = streamed if args.cut else padded
    make_first = streamed(stories, cfg.seq_len, first.batch_size)
    make_second = pack(chats, cfg.seq_len, second.batch_size)
    if args.seconds:
        grow = args.seconds / (step_seconds(cfg, first, make_first) * (first.steps + second.steps))
        first = fnlm.override(first, steps=max(1, round(first.steps * grow)))
        second = fnlm.override(second, steps=max(1, round(second.steps * grow)))
    asked = world.questions(args.seed, args.questions)
    few = asked[: len(asked) // 3]
    began = time.perf_counter()

    def say(phase: str) -> Callable[[int, float, fnlm.Params], None]:
        def every(step: int, loss: float, params: fnlm.Params) -> None:
            right = held_out(params, cfg, few, ids, chat=phase == "finetune")
            print(f"{phase} {time.perf_counter() - began:5.0f} s  step {step:5d}  loss {loss:.4f}  {right}", flush=True)

        return every

    print(f"{fnlm.count(cfg)} parameters, {len(ids)} words, {per_token():.4f} nats of entropy a token", flush=True)
    params = train(fnlm.init_params(cfg, fnlm.key(args.seed)), cfg, first, make_first, args.seed, say("pretrain"))
    params = train(params, cfg, second, make_second, args.seed, say("finetune"))
    seconds = time.perf_counter() - began
    result = {"seed": args.seed, "steps": [first.steps, second.steps], "seconds": round(seconds, 1)}
    print(json.dumps(result | held_out(params, cfg, asked, ids, chat=True)))
    if args.show:
        shown = asked[:18]
        said = answers(params, cfg, [chat_ids(q.messages, ids, reply=True) for q in shown], ids)
        for q, text in zip(shown, said, strict=True):
            print(f"{q.kind}: {q.messages[-1]['content']}\n    {text}   [{q.answer}]")


def per_token() -> float:
    """The entropy of a story over its mean length in tokens, its end included."""
    lengths = [len(words(text)) + 1 for text in world.stories(1, 5000)]
    return world.entropy() / (sum(lengths) / len(lengths))


def pair(text: str) -> tuple[str, object]:
    name, _, value = text.partition("=")
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        parsed = value
    return name, tuple(tuple(x) for x in parsed) if isinstance(parsed, list) else parsed


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("fields", nargs="*", help="model fields, JSON values")
    p.add_argument("--train", action="append", default=[], help="pretraining field=value")
    p.add_argument("--tune", action="append", default=[], help="finetuning field=value")
    p.add_argument("--seconds", type=float, default=0.0, help="for both together; 0: the preset's steps")
    p.add_argument("--questions", type=int, default=450)
    p.add_argument("--cut", action="store_true", help="cut chats where a row ends, instead of whole chats in every row")
    p.add_argument("--show", action="store_true", help="print some answers")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=2)
    return p.parse_intermixed_args()


if __name__ == "__main__":
    main()
