"""What a model makes of texts and tasks: any text with its words and bytes, tasks from files, and lm-eval's."""

from fnlm.evaluation.scoring import Scored, pair, rolling, score
from fnlm.evaluation.tasks import TASKS, Example, hellaswag, lambada, measured
from fnlm.evaluation.texts import Text, normalised, read_text, text_of, words_of

__all__ = [
    "TASKS",
    "Example",
    "Scored",
    "Text",
    "hellaswag",
    "lambada",
    "measured",
    "normalised",
    "pair",
    "read_text",
    "rolling",
    "score",
    "text_of",
    "words_of",
]
