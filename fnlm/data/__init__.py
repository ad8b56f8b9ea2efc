"""Data: files to tokens on disk, and tokens to batches, each batch a function of (key, step)."""

from fnlm.data.batches import batch_at, batches, sample_ids, window_count, window_starts, windows
from fnlm.data.chat import conversations, prompt, render
from fnlm.data.manifest import DataError, Dataset, Split, boundary, open, require_same_tokenizer, verify
from fnlm.data.named import NAMES, named
from fnlm.data.prefetch import prefetch
from fnlm.data.prepare import Preparation, prepare
from fnlm.data.sizes import Sizes

__all__ = [
    "NAMES",
    "DataError",
    "Dataset",
    "Preparation",
    "Sizes",
    "Split",
    "batch_at",
    "batches",
    "boundary",
    "conversations",
    "named",
    "open",
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
