"""Data: files to tokens on disk, and tokens to batches, each batch a function of (key, step)."""

from fnlm.data.batches import batch_at, batches, sample_ids, window_count, window_starts, windows
from fnlm.data.chat import conversations, prompt, render
from fnlm.data.corpora import CORPORA, domains_of
from fnlm.data.dialogue import Dialogue, dialogue_of, is_chat
from fnlm.data.gather import Wanted
from fnlm.data.manifest import DataError, Dataset, Split, boundary, open, require_same_tokenizer, verify
from fnlm.data.mixing import mix, parts_of
from fnlm.data.named import NAMES, named
from fnlm.data.prefetch import prefetch
from fnlm.data.prepare import Preparation, prepare
from fnlm.data.sizes import Sizes

__all__ = [
    "CORPORA",
    "NAMES",
    "DataError",
    "Dialogue",
    "Dataset",
    "Preparation",
    "Sizes",
    "Split",
    "Wanted",
    "batch_at",
    "batches",
    "boundary",
    "conversations",
    "dialogue_of",
    "domains_of",
    "is_chat",
    "mix",
    "named",
    "open",
    "parts_of",
    "prefetch",
    "prepare",
    "prompt",
    "render",
    "require_same_tokenizer",
    "sample_ids",
    "verify",
    "window_count",
    "window_starts",
    "windows",
]
