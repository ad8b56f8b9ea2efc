"""Mixtures: shares of tokens, whole documents, each once, the same for the same seed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fnlm import data
from fnlm.data import DataError, Preparation, manifest, mixing
from fnlm.data.mixing import Part

EOT = "<|endoftext|>"


def folder(out: Path, rows: list[dict[str, Any]], **settings: Any) -> str:
    file = out.with_suffix(".jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data.prepare(Preparation((str(file),), out, **{"tokenizer": "byte", **settings}))
    return str(out)


def words(name: str, n: int, length: int) -> list[dict[str, Any]]:
    return [{"text": f"{name}{i} ".ljust(length, name)} for i in range(n)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    at = tmp_path_factory.mktemp("two")
    return [folder(at / "a", words("a", 400, 30)), folder(at / "b", words("b", 300, 90))]


def mixed(two: list[str], out: Path, weights: tuple[float, float], **how: Any) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    made = data.mix(data.parts_of([f"{f}={w}" for f, w in zip(two, weights, strict=True)]), out, say=said.append, **how)
    list(data.verify(out))
    opened = data.open(out)
    return made, opened.tokenizer.decode(opened.train.tokens).removesuffix(EOT).split(EOT)


@given(weight=st.integers(1, 99), seed=st.integers(0, 9))
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_shares_are_those_of_tokens(
    weight: int, seed: int, two: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    made, texts = mixed(two, tmp_path_factory.mktemp("mix") / "out", (weight, 100 - weight), seed=seed)
    assert max(Counter(texts).values()) == 1
    shares = made["mixture"]["train"]
    total = made["splits"]["train"]["tokens"]
    assert sum(part["tokens"] for part in shares) == total
    assert abs(shares[0]["tokens"] - weight / 100 * total) <= 100  # to within one document
    assert sum(len(t) + 1 for t in texts if t[0] == "a") == shares[0]["tokens"]
    assert made["splits"]["train"]["bytes"] == sum(map(len, texts))
    used = [part["tokens"] / len(data.open(f).train.tokens) for part, f in zip(shares, two, strict=True)]
    assert max(used) > 0.9  # as much as there is


def test_the_shares_hold_all_along_and_a_seed_decides_the_order(two: list[str], tmp_path: Path) -> None:
    runs = [mixed(two, tmp_path / str(i), (0.5, 0.5), seed=seed) for i, seed in enumerate((3, 3, 4))]
    assert runs[0][0]["splits"] == runs[1][0]["splits"]
    assert runs[0][1] != runs[2][1]
    half = runs[0][1][: len(runs[0][1]) // 2]
    assert abs(sum(len(t) * (1 if t[0] == "a" else -1) for t in half)) < 200
    assert half != sorted(half)


def test_more_tokens_than_there_are_repeat_the_smaller_part(two: list[str], tmp_path: Path) -> None:
    made, texts = mixed(two, tmp_path / "out", (0.5, 0.5), tokens=40_000)
    counts = Counter(texts)
    a = {t: n for t, n in counts.items() if t[0] == "a"}
    assert max(a.values()) - min(a.values()) == 1 and min(a.values()) >= 1
    assert 40_000 <= made["splits"]["train"]["tokens"] < 40_200
    assert made["mixture"]["train"][0]["epochs"] == pytest.approx(
        20_000 / len(data.open(two[0]).train.tokens), rel=0.01
    )
    assert made["mixture"]["val"][0]["epochs"] <= 1


def test_masks_go_along(tmp_path: Path) -> None:
    rows = [[{"prompt": f"{n}{i}", "completion": f"{n} {i}"} for i in range(40)] for n in "ab"]
    folders = [folder(tmp_path / n, r) for n, r in zip("ab", rows, strict=True)]
    mixed(folders, tmp_path / "out", (1, 3))
    train = data.open(tmp_path / "out").train
    learnt = data.open(tmp_path / "out").tokenizer.decode(train.tokens[train.mask == 1])
    assert set(learnt.split("<|im_end|>")) <= {f"{n} {i}" for n in "ab" for i in range(40)} | {""}


def test_text_without_ends_is_taken_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "PIECE", 10)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("".join(f"ab {i}" for i in range(400)))
        data.prepare(Preparation((str(tmp_path / f"{name}.txt"),), tmp_path / name, "char"))
    made, _ = mixed([str(tmp_path / n) for n in "ab"], tmp_path / "out", (0.3, 0.7))
    assert abs(made["mixture"]["train"][0]["share"] - 0.3) < 0.01


def test_again_and_what_is_refused(two: list[str], tmp_path: Path) -> None:
    parts = [Part(two[0], 0.5), Part(two[1], 0.5)]
    data.mix(parts, tmp_path / "out", say=lambda line: None)
    said: list[str] = []
    data.mix(parts, tmp_path / "out", say=said.append)
    assert said == [f"{tmp_path / 'out'} is already prepared from these folders"]
    with pytest.raises(ValueError, match="already holds other data"):
        data.mix(parts, tmp_path / "out", seed=1)
    other = folder(tmp_path / "other", words("c", 20, 30), tokenizer="char")
    with pytest.raises(
        DataError, match=r"other was made with another tokenizer than .*a; prepare one with --tokenizer"
    ):
        data.mix([parts[0], Part(other, 0.5)], tmp_path / "none")
    talk = folder(tmp_path / "talk", [{"prompt": f"{i}", "completion": "x"} for i in range(20)])
    with pytest.raises(DataError, match="differ in kind; they do not mix"):
        data.mix([parts[0], Part(talk, 0.5)], tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("given", [["a", "b=1"], ["a=0", "b=1"], ["a=x", "b=1"], ["a=nan", "b=1"], ["=1", "b=1"]])
def test_a_weight_is_a_number(given: list[str]) -> None:
    with pytest.raises(ValueError, match=r"has no weight; write data/a=0\.7 data/b=0\.3"):
        data.parts_of(given)


@pytest.mark.parametrize("given", [["a=1e-308", "b=1e308"], ["a=1e308", "b=1e308"]])
def test_weights_that_vanish_beside_each_other(given: list[str]) -> None:
    with pytest.raises(ValueError, match="the weights lie too far apart"):
        data.parts_of(given)


TURNS = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"  # whose end of text ends turns


def test_what_a_template_wrote_keeps_it(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(20)]
    own = [folder(tmp_path / n, rows, template=TURNS) for n in "ab"]
    made = data.mix([Part(own[0], 0.5), Part(own[1], 0.5)], tmp_path / "out", say=lambda line: None)
    assert (made["template"], made["eot_within"]) == (TURNS, True)
    with pytest.raises(DataError, match="its chat template ends turns as documents end"):
        manifest.boundary(data.open(tmp_path / "out"))
    plain = folder(tmp_path / "c", rows)
    with pytest.raises(DataError, match="differ in template; they do not mix"):
        data.mix([Part(own[0], 0.5), Part(plain, 0.5)], tmp_path / "none")


def test_more_than_the_disk_has_is_refused(two: list[str], tmp_path: Path) -> None:
    with pytest.raises(mixing.NoRoom, match=r"--tokens would take 2,000,.* bytes, .* has .* free; choose fewer"):
        data.mix([Part(two[0], 0.5), Part(two[1], 0.5)], tmp_path / "new" / "out", tokens=10**18)
    assert not list(tmp_path.iterdir())


def test_a_part_is_not_replaced_by_the_mixture(two: list[str]) -> None:
    before = data.open(two[0]).manifest
    with pytest.raises(ValueError, match=r"--out .*a is mixed itself; choose another"):
        data.mix([Part(two[0], 0.5), Part(two[1], 0.5)], Path(two[0]), force=True)
    assert data.open(two[0]).manifest == before


@pytest.mark.parametrize("given", [[], ["a=1"], ["a=1", "a=2"], ["a=1", "a/=1"]])
def test_a_mixture_has_two_parts(given: list[str]) -> None:
    with pytest.raises(ValueError, match="at least two different folders"):
        data.parts_of(given)
