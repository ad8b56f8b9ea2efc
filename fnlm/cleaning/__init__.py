"""Cleaning of documents: steps that drop or change a text, put together by name, the same for any number of workers."""

from fnlm.cleaning.duplicates import Exact, MinHash
from fnlm.cleaning.language import function_words, language_of
from fnlm.cleaning.pii import luhn, masked
from fnlm.cleaning.pipeline import NAMES, Cleaner, Step, WorkerLost, check, steps_of
from fnlm.cleaning.quality import gopher, repetition

__all__ = [
    "NAMES",
    "Cleaner",
    "Exact",
    "MinHash",
    "Step",
    "WorkerLost",
    "check",
    "function_words",
    "gopher",
    "language_of",
    "luhn",
    "masked",
    "repetition",
    "steps_of",
]
