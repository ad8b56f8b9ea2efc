"""Every line of README that begins with `fnlm` and names files is run, in order, with models that fit a test."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny_runs as tiny

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = {"N_LAYERS": 1, "D_MODEL": 32, "N_HEADS": 2, "D_FF": 64, "SEQ_LEN": 16, "STEPS": 3, "BATCH_SIZE": 2}
SMALL |= {"MICRO_BATCHES": 1, "PRECISION": "fp32", "SAMPLE_TOKENS": 4}


def lines() -> list[str]:
    """The block of commands, and those of the table of jobs."""
    block = re.search(r"```sh\n(.*?)```", README, re.S)
    assert block is not None
    table = re.search(r"\| job \| lines \|\n(.*?)\n\n", README, re.S)
    assert table is not None
    return block.group(1).strip().splitlines() + re.findall(r"`(fnlm [^`]*)`", table.group(1))


def workplace(folder: Path) -> None:
    """The files that README speaks of."""
    text = "ROMEO: o! " + tiny.TEXT * 40
    (folder / "corpus").mkdir()
    for name in ("input.txt", "stories.txt", "corpus/a.txt", "corpus/b.txt"):
        (folder / name).write_text(text + name)
    (folder / "my.jsonl").write_text("".join(json.dumps({"text": f"{i}. {tiny.TEXT}"}) + "\n" for i in range(20)))
    talk = "".join(f"How are you , {name} ? __eou__ Fine , thank you ! __eou__\n" for name in "ABCDEFGHIJKLMNOPQRST")
    (folder / "dialogues.txt").write_text(talk)


@pytest.mark.slow
def test_every_line_of_readme_runs(tmp_path: Path, test_data: Path) -> None:
    workplace(tmp_path)
    environment = {**os.environ, **{f"FNLM_{name}": str(value) for name, value in SMALL.items()}}
    told = lines()
    assert len(told) >= 12
    for line in told:
        # the vocabularies that are fetched lie on the disk, and a corpus this small makes a small one
        line = re.sub(r"(--tokenizer (?:gpt2|cl100k))\b", rf"\1:{test_data}/vocab", line).replace(
            "bpe:16000", "bpe:300"
        )
        words = shlex.split(line)[1:]
        run = [sys.executable, "-m", "cli", *words]
        done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (line, done.stderr[-2000:])
        assert "Traceback" not in done.stderr
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "runs/dialogues/checkpoints").is_dir()
