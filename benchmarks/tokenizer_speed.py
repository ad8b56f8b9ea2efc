"""Tokenizers against the libraries below them, used directly: BPE training, encoding with it, and with gpt2.

    python benchmarks/tokenizer_speed.py [--text FILE] [--mb 100] [--vocab 16000] [--rounds 3] [--gpt2 FOLDER]

The text is FILE, documents parted by <|endoftext|>, repeated up to --mb (10**6 bytes); without it, our generated
stories. FOLDER holds vocab.bpe (and encoder.json); without it gpt2 is left out. In turns, the order reversed every
other round, in one process with all its threads:

* training: `fnlm.tokenizers.train` beside `tokenizers.Tokenizer.train_from_iterator` on the same documents;
* encoding: ours to uint32 arrays beside `Tokenizer.encode_batch` and its ids, a mebibyte of documents at a time;
* gpt2: ours to uint32 arrays beside `tiktoken.Encoding.encode_ordinary_batch` with as many threads as cores.

Both must give the same tokens, else it fails. MB/s are medians; `ratio` is the median over rounds of ours over the
other's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from itertools import count, cycle
from pathlib import Path

import numpy as np
import tokenizers as library
from tokenizers import decoders, models, pre_tokenizers, trainers

from fnlm import tokenizers, world
from fnlm.tokenizers import CHAT_SPECIAL, END_OF_TEXT

GROUP = 1 << 20
Ids = list[np.ndarray]


def documents(file: Path | None, size: int) -> list[str]:
    """Texts of `size` bytes together."""
    if file is None:
        source = (text for seed in count() for text in world.stories(seed, 10_000))
    else:
        texts = [t.strip("\n") for t in file.read_text(encoding="utf-8").split(END_OF_TEXT)]
        source = (text for text in cycle(texts) if text)
    found: list[str] = []
    while size > 0:
        found.append(next(source))
        size -= len(found[-1].encode("utf-8"))
    return found


def groups(texts: list[str]) -> list[list[str]]:
    """The texts, a mebibyte at a time."""
    made: list[list[str]] = [[]]
    size = 0
    for text in texts:
        made[-1].append(text)
        size += len(text)
        if size >= GROUP:
            made.append([])
            size = 0
    return [group for group in made if group]


def train_directly(texts: list[str], vocab_size: int) -> str:
    model = library.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(CHAT_SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    return model.to_str()


def compared(ours: Callable[[], object], other: Callable[[], object], mb: float, rounds: int) -> dict[str, float]:
    """MB/s of both, and the median ratio; fails where the results differ."""
    seconds: dict[str, list[float]] = {"ours": [], "other": []}
    for i in range(rounds):
        results = {}
        for name, run in list({"ours": ours, "other": other}.items())[:: -1 if i % 2 else 1]:
            start = time.perf_counter()
            results[name] = run()
            seconds[name].append(time.perf_counter() - start)
        if results["ours"] != results["other"]:
            raise SystemExit("the two results differ")
    ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["other"], strict=True))
    speed = {name: round(mb / statistics.median(times), 2) for name, times in seconds.items()}
    return {**speed, "ratio": round(ratio, 3)}


def total(rows: Ids | list[list[int]]) -> tuple[int, int]:
    """The number of tokens and a sum that the order of the texts and of the ids changes."""
    weighed = (int(np.dot(np.asarray(ids, np.int64), np.arange(1, len(ids) + 1))) * i for i, ids in enumerate(rows, 1))
    return sum(map(len, rows)), sum(weighed) % 2**61


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, metavar="FILE")
    parser.add_argument("--mb", type=float, default=100)
    parser.add_argument("--vocab", type=int, default=16_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpt2", metavar="FOLDER")
    args = parser.parse_args()
    texts = documents(args.text, int(args.mb * 1e6))
    parts, report = groups(texts), {}
    report["train"] = compared(
        lambda: json.loads(tokenizers.train("bpe", texts, args.vocab).json)["model"],
        lambda: json.loads(train_directly(texts, args.vocab))["model"],
        args.mb, args.rounds,
    )  # fmt: skip
    print(f"train: {report['train']}")
    mine = tokenizers.train("bpe", texts[: len(texts) // 10 + 1], args.vocab)
    direct = library.Tokenizer.from_str(mine.json)
    report["encode"] = compared(
        lambda: [total(mine.encode_arrays(part)) for part in parts],
        lambda: [total([e.ids for e in direct.encode_batch(part, add_special_tokens=False)]) for part in parts],
        args.mb, args.rounds,
    )  # fmt: skip
    print(f"encode: {report['encode']}")
    if args.gpt2:
        gpt2, threads = tokenizers.named("gpt2", args.gpt2), os.cpu_count() or 1
        tiktoken = gpt2._library  # type: ignore[attr-defined]
        report["gpt2"] = compared(
            lambda: [total(gpt2.encode_arrays(part)) for part in parts],
            lambda: [total(tiktoken.encode_ordinary_batch(part, num_threads=threads)) for part in parts],
            args.mb, args.rounds,
        )  # fmt: skip
        print(f"gpt2: {report['gpt2']}")
    print(json.dumps({"tokenizer_speed": report, "mb": args.mb, "vocab": mine.vocab_size, "cores": os.cpu_count()}))


if __name__ == "__main__":
    main()
