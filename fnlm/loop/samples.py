"""What the model writes while it learns: a text file for each time it is asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fnlm.config import ModelConfig
from fnlm.data import Dataset, Dialogue
from fnlm.generate import complete
from fnlm.loop.settings import RunConfig
from fnlm.sampling import Settings
from fnlm.types import Key, Params

PARTED = "-" * 40  # the line between two samples
DOCUMENTS, BEGINNING = 3, 8  # of the validation split, where no prompts are given; tokens of each


class Sampler:
    """Continues the run's prompts, greedily for conversations; `write` puts them into `samples/STEP.txt`."""

    def __init__(self, cfg: ModelConfig, run: RunConfig, dataset: Dataset, folder: Path) -> None:
        self._cfg, self._folder, self._tokenizer = cfg, folder, dataset.tokenizer
        dialogue = Dialogue(dataset.tokenizer, dataset.manifest.get("template"))
        self._chat = dialogue if dataset.manifest["kind"] == "chat" else None
        self._prompts = _given(run, dataset, self._chat) or beginnings(dataset, cfg.seq_len // 2)
        for prompt, text in zip(self._prompts, run.sample_prompts, strict=False):
            if not 0 < len(prompt) < cfg.seq_len:
                raise ValueError(
                    f"sample_prompts has {text[:40]!r}, {len(prompt)} tokens; choose 1 to {cfg.seq_len - 1}"
                )
        self._settings = Settings(temperature=0.0 if self._chat else 0.8, max_tokens=run.sample_tokens)

    def write(self, params: Params, key: Key, step: int) -> str:
        """The text of the samples; a prompt and its continuation are parted by ⏵. Empty where nothing can be asked.

        Raises ValueError where the model's logits are not finite.
        """
        if not self._prompts:
            return ""
        made = complete(
            params, self._cfg, self._tokenizer, self._prompts, self._settings, key, chat=self._chat or False
        )
        shown = [f"{self._tokenizer.decode(p)}⏵{g.text}" for p, g in zip(self._prompts, made, strict=True)]
        text = f"\n{PARTED}\n".join(shown) + "\n"
        (self._folder / f"{step:08d}.txt").write_text(text, encoding="utf-8")
        return text


def _given(run: RunConfig, dataset: Dataset, chat: Dialogue | None) -> list[list[int]]:
    if chat is not None:
        return [chat.prompt([{"role": "user", "content": text}]) for text in run.sample_prompts]
    return [dataset.tokenizer.encode(text) for text in run.sample_prompts]


def beginnings(dataset: Dataset, most: int) -> list[list[int]]:
    """How the first validation documents begin: a few tokens of a text, all before the first answer of a chat."""
    tokens, mask, eot = dataset.val.tokens[: 1 << 16], dataset.val.mask, dataset.tokenizer.eot_id
    ends = np.flatnonzero(tokens == eot) + 1 if eot is not None else np.zeros(0, np.int64)
    starts = [0, *ends[: DOCUMENTS - 1].tolist()]
    found = []
    for start in starts:
        learnt = np.flatnonzero(mask[start : start + most]) if mask is not None else np.zeros(0, np.int64)
        size = int(learnt[0]) if learnt.size else min(BEGINNING, most)
        ids = tokens[start : start + size].tolist()
        if ids and not (mask is not None and not learnt.size):
            found.append(ids)
    return found
