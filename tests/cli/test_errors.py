"""What users get wrong: for each mistake one line that begins with `error:`, the right exit code, and no traceback.

A new mistake is a row of `MISTAKES`: the command line, the exit code, what the line says (a pattern). All run in the
folder that `workplace` fills, and must leave it as it was. A few run again as processes, as a user runs them.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cli.main import COMMANDS, cli

ROOT = Path(__file__).parents[2]
FAILURE, USAGE, UNFIT, BAD = 1, 2, 3, 4
TINY = ["n_layers=1", "n_heads=2", "d_model=16", "seq_len=16", "batch_size=2", "steps=2", "schedule=constant", "keep=1"]

MODEL = ("eval", "serve", "chat", "sample")  # commands that are given a model
OTHER = "data/bytes was made with another tokenizer"
MISTAKES = [
    # commands and options
    ("trian", USAGE, r"there is no command 'trian'; did you mean 'train'\? See 'fnlm --help'"),
    *((f"{name} --nonsense", USAGE, r".*nonsense.*") for name in ("prepare", "inspect", "doctor", "report", *MODEL)),
    ("eval runs/tiny --quantize int5", USAGE, r".*'--quantize': 'int5' is not one of 'int8', 'int4'.*"),
    ("train demo data/tale --track wandbb", USAGE, r".*'wandbb' is not one of 'wandb', .*"),
    ("train demo data/tale --nonsense 3", USAGE, r"there is no setting 'nonsense'.*"),
    # settings
    ("train demo data/tale lrr=1e-3", USAGE, r"there is no setting 'lrr'; did you mean 'lr'\?"),
    ("train demo data/tale lr=fast", USAGE, r"lr=fast is not a number"),
    ("train demo data/tale steps=1.5", USAGE, r"steps=1\.5 is not a whole number"),
    ("train demo data/tale optimizer=adamm", USAGE, r".*did you mean 'adam'\?"),
    ("train demo data/tale n_heads=5", USAGE, r".*n_heads=5.*"),
    ("train demo data/tale guard=maybe", USAGE, r".*guard.*maybe.*"),
    ("train demo data/tale keep=0", USAGE, r"keep=0 must be .*"),
    ("train demo data/tale device=tpu", USAGE, r"device='tpu' is unknown; .*"),
    ("train demo data/tale steps=2 extra", USAGE, r".*'extra'.*"),
    ("train dmeo data/tale", USAGE, r"there is no preset 'dmeo'; did you mean 'demo'\?"),
    ("inspect dmeo", USAGE, r"there is no preset 'dmeo'; did you mean 'demo'\?"),
    ("inspect demo d_modle=3", USAGE, r".*'d_modle'; did you mean 'd_model'\?"),
    ("train demo data/tale --config none.toml", FAILURE, r"none\.toml: No such file or directory"),
    ("train demo data/tale --config broken.toml", USAGE, r"broken\.toml.*"),
    ("train demo data/tale --config latin1.yaml", USAGE, r"latin1\.yaml.*"),
    ("train demo data/tale --config odd.yaml", USAGE, r"odd\.yaml: there is no setting 'train\.lrr'; did you mean .*"),
    ("train demo data/tale ", USAGE, r"an empty word \(''\) names nothing; .*"),
    ("train demo data/tale ema=2", USAGE, r"ema=2\.0 is outside \[0, 1\); choose e\.g\. 0\.999"),
    ("train demo data/tale batch_size=4 ramp=[[2,8]]", USAGE, r"ramp has 8 sequences, more than the full step of 4.*"),
    # what is trained
    ("train demo data/tale freeze=embde", USAGE, r"freeze has 'embde', which no parameter is called; .* 'embed'\?"),
    ("train demo data/tale freeze=*", USAGE, r"freeze=\* leaves nothing to train; .*"),
    ("train demo data/tale lr_scale=embed", USAGE, r"lr_scale has 'embed'; write PATTERN=FACTOR .*"),
    ("train demo data/tale lr_scale=head.wieght=2", USAGE, r"lr_scale has 'head\.wieght', .*'head\.weight'\?"),
    ("train demo data/tale layer_decay=1.5", USAGE, r"layer_decay=1\.5 must lie .*"),
    ("train demo data/tale lora=0", USAGE, r"lora=0 must be .*"),
    ("train demo data/tale lora=8000", USAGE, r"lora=8000 does not fit blocks\.0\.attn\.q .*"),
    ("train demo data/tale lora=4 freeze=embed", USAGE, r"with lora all parameters are frozen .*"),
    ("train demo data/tale lora=4 lora_targets=atn", USAGE, r"lora_targets has 'atn', .*; did you mean 'attn'\?"),
    ("train demo data/tale lora_alpha=4", USAGE, r"lora_alpha and lora_targets are of adapters; .*"),
    ("train demo data/tale lora=4 --simulate 2 --strategy ddp", USAGE, r"strategy ddp is PyTorch's own reducer .*"),
    ("train demo data/tale length=4000", USAGE, r"length=4000 is more than seq_len=.*"),
    ("plan --model gpt2 --mesh data=4 lora=8000", USAGE, r"lora=8000 does not fit blocks\.0\.attn\.q .*"),
    # other people's models
    ("plan --model gtp2 --mesh data=4", USAGE, r"there is no preset 'gtp2'; did you mean 'gpt2'\?.*"),
    ("plan --model gpt2 --mesh dta=4", USAGE, r".*dta.*"),
    ("export none", BAD, r"there is no none.*"),
    ("export runs/tiny --out tale.txt --force", BAD, r"tale\.txt holds what no export has written; .*"),
    ("export runs/tiny --shard-size huge", USAGE, r"'huge' is not a size such as 500MB, 2GB or 1\.5GiB"),
    ("export runs/tiny --to gguf --shard-size 1GB", USAGE, r"--shard-size is for hf; gguf is one file"),
    ("import runs/tiny", BAD, r"runs/tiny is fnlm's own, .*"),
    ("export --to gguff none", USAGE, r".*'gguff' is not .*"),
    ("export runs/tiny --out runs/tiny --force", BAD, r"runs/tiny holds what no export has written; .*"),
    ("export runs/tiny --out ..", BAD, r"--out \.\. has no name of its own; choose one such as runs/NAME"),
    ("import none", BAD, r"there is no none.*"),
    ("import data/tale", BAD, r"data/tale has no config\.json.*"),
    ("import empty.txt", BAD, r"empty\.txt is no model.*"),
    # what does not fit
    ("train demo data/tale batch_size=4000000", UNFIT, r".*memory.*|.*GiB.*"),
    ("tune", USAGE, r"which model\? name a run or a preset, such as demo.*"),
    ("tune nonesuch data/tale", BAD, r"there is no nonesuch.*"),
    ("tune runs/tiny data/tale --lrs fast", USAGE, r"--lrs fast is no list of numbers above 0; .*"),
    ("tune runs/tiny data/tale --lengths 3 --budget 9", USAGE, r"--budget sets the number of steps; .*"),
    ("tune runs/tiny data/tale --out data", USAGE, r"data holds what no search has written; .*"),
    ("tune runs/tiny data/bytes", BAD, OTHER + r".*"),
    ("export runs/tiny --to peft", BAD, r"runs/tiny.* has no adapters: it was not trained with lora=RANK"),
    ("train demo data/tale batch_size=2 --simulate 3 --strategy zero3", USAGE,
     r"2 rows are too few for 3 ranks along data; give a micro-batch at least 3 rows, or choose at most 2 ranks"),
    ("train demo data/tale batch_size=4000000 --simulate 2 --strategy zero3", UNFIT,
     r".*for 2 ranks of zero3 on data=2, .*"),
    # data
    ("prepare none.txt", FAILURE, r"none\.txt: no such file, folder or pattern"),
    ("prepare empty.txt", BAD, r"empty\.txt is empty"),
    ("prepare latin1.txt", BAD, r"latin1\.txt: byte 1 is not UTF-8 \(.*\); convert the file first"),
    ("prepare broken.jsonl", BAD, r"broken\.jsonl, line 2 is not JSON: .*"),
    ("prepare deep.jsonl", BAD, r"deep\.jsonl, line 1 cannot be read: .*"),
    ("prepare deep.json", BAD, r"deep\.json is not JSON: .*"),
    ("prepare digits.jsonl", BAD, r"digits\.jsonl, line 2 cannot be read: Exceeds the limit .*"),
    ("prepare data/tale --show 1 --json", USAGE, r"--show prints text; leave --json out; see .*"),
    ("prepare torn.parquet", BAD, r"torn\.parquet is not a whole \.parquet file: .*"),
    ("prepare tale.txt --out data/new --tokenizer bpe:9", USAGE, r"vocab_size=9 has no room for 256 bytes .*"),
    ("prepare tale.txt --out data/new --tokenizer gtp2", USAGE, r"there is no tokenizer 'gtp2'; did you mean 'gpt2'\?"),
    ("prepare tale.txt --tokenizer byte", USAGE, r"data/tale already holds other data; choose another --out, .*"),
    ("prepare --verify tale.txt", BAD, r"tale\.txt is a file, not a prepared folder; 'fnlm prepare .*"),
    ("prepare silent.jsonl --tokenizer byte", BAD, r"silent\.jsonl: no conversation has an assistant's message, .*"),
    ("prepare tale.txt --out data/new --clean exat", USAGE, r"there is no cleaning step 'exat'; did you mean .*"),
    ("prepare tale.txt --out data/new --clean language", USAGE, r"which language\? write language=en; known: .*"),
    ("prepare tale.txt --out data/new --clean gopher", BAD, r"tale\.txt: cleaning left none of 1 documents .*"),
    ("prepare tale.txt --out data/new --domains nws", USAGE, r"'nws' is no host; did you mean 'news'\?"),
    ("prepare tale.txt --out data/new --domains news", BAD, r"--domains needs rows with a 'url', as c4's have"),
    ("prepare tale.txt --out data/new --template runs/tiny", USAGE, r"runs/tiny has no chat template; give a run, .*"),
    ("prepare hub:", USAGE, r"hub: is no dataset; write hub:org/name, .*"),
    ("prepare tale.txt --out .", USAGE, r"--out \. has no name of its own; choose one such as data/NAME"),
    ("prepare tale.txt --out data/new --tokenizer bpe:99999999", USAGE, r"bpe:99999999 is more than the .* tokens .*"),
    ("prepare mix data/tale=1", USAGE, r"a mixture has at least two different folders; .*"),
    ("prepare mix data/tale data/bytes=1", USAGE, r"data/tale has no weight; write data/a=0\.7 data/b=0\.3"),
    ("prepare mix data/tale=1 data/bytes=1", BAD, r"data/bytes was made with another tokenizer than data/tale; .*"),
    ("train demo data/tale documents=apart", BAD, r"data/tale: nothing stands between documents, .*=together, .*"),
    ("train demo data/tale documents=apart document_end=1 document_start=2", USAGE, r"document_end and .* one of them"),
    ("prepare --verify data/torn", BAD, r"data/torn/train\.bin.*"),
    ("train demo data/none", BAD, r"data/none does not exist; make it with 'fnlm prepare PATH --out data/none'"),
    ("train demo data/torn", BAD, r"data/torn/train\.bin.*"),
    ("train demo runs/tiny", BAD, r"runs/tiny.*"),
    ("train demo", BAD, r"which data\? give --data FOLDER, .*"),
    ("train demo data/tale vocab_size=5", BAD, r"vocab_size=5 is too small for data/tale, .*"),
    ("train demo data/bytes --init-from runs/tiny", BAD, rf"{OTHER} than runs/tiny.*"),
    ("finetune runs/tiny data/bytes", BAD, rf"{OTHER} than runs/tiny.*"),
    ("eval runs/tiny --data data/bytes", BAD, rf"{OTHER} .*"),
    ("eval runs/tiny --data data/none", BAD, r"data/none does not exist.*"),
    # models
    ("train demo data/tale --out runs/tiny", USAGE, r"runs/tiny holds a run; continue it with --resume, .*"),
    ("train --resume runs/none", BAD, r"there is no runs/none to resume from"),
    ("train --resume runs/torn", BAD, r"runs/torn has no whole checkpoint to resume from"),
    *(
        (f"train --out runs/tiny {words}", BAD, rf"runs/tiny/checkpoints/\d{{8}} does not fit: .*; use {then}, with .*")
        for words, then in (
            ("d_model=32 --resume", "d_model=16"),
            ("--resume d_model=32 lr=1e-3", "d_model=16"),
            ("--resume=auto optimizer=adamw", "optimizer=muon"),
            ("--resume=auto ema=0.9 dropout=0.5 steps=9", "ema=None"),
        )
    ),
    ("train --resume=steps=3 demo data/tale", BAD, r"there is no steps=3 to resume from"),
    ("train --resume runs/tiny --data data/bytes", BAD, r"data/bytes is not what runs/tiny.* was trained on .*"),
    ("train demo data/tale --init-from runs/tiny n_layers=2", BAD, r"runs/tiny.* does not fit: .*"),
    ("train demo data/tale --init-from runs/torn", BAD, r".*runs/torn.*"),
    ("finetune", USAGE, r"which model\?.*"),
    ("finetune runs/tiny data/tale --out runs/tiny --force", USAGE, r"runs/tiny holds the model to start from; .*"),
    ("finetune runs/tny data/tale", BAD, r"there is no runs/tny; did you mean 'tiny'\?"),
    ("finetune runs/torn data/tale", BAD, r".*runs/torn.*"),
    *((f"{name} runs/tny", BAD, r"there is no runs/tny; did you mean 'tiny'\?") for name in ("report", *MODEL)),
    *((f"{name} runs/torn", BAD, r".*runs/torn.*") for name in ("eval", "sample", "chat")),
    *((f"{name} runs/empty", BAD, r".*runs/empty.*") for name in ("report", *MODEL)),
    ("serve --follow runs", BAD, r"runs is no run: it has no metrics\.jsonl; name a folder such as runs/demo"),
    ("serve tale.txt", BAD, r"tale\.txt is not a folder; .*"),
    ("eval", USAGE, r"name a model, such as runs/demo; see 'fnlm eval --help'"),
    ("eval runs/tiny --checkpoint 77", BAD, r"runs/tiny/checkpoints has no checkpoint of step 77; it has .*"),
    ("eval runs/tiny --seq-len 99999", USAGE, r".*99999.*"),
    ("eval runs/tiny --data tale.txt --split train", USAGE, r"--split is of prepared data, and tale\.txt is text; .*"),
    ("eval runs/tiny --data latin1.txt", BAD, r"latin1\.txt: byte 1 is not UTF-8 .*"),
    ("eval runs/tiny --data empty.txt", BAD, r"empty\.txt is empty"),
    ("eval runs/tiny --data data/tale/train.bin", BAD, r"data/tale/train\.bin holds tokens; name the folder .*"),
    ("eval runs/tiny --data silent.jsonl", BAD, r"silent\.jsonl holds conversations; prepare them, .*"),
    ("eval runs/tiny --device tpu", USAGE, r"--device tpu is not there; choose cpu.*"),
    ("eval runs/tiny --out data", USAGE, r"--out data is a folder; name a file in it, such as data/results\.json"),
    ("eval runs/tiny --all-checkpoints --checkpoint 2", USAGE, r"--all-checkpoints takes them all; .*"),
    ("eval runs/tiny --data runs/empty", BAD, r"runs/empty has no file that ends in .*"),
    ("eval runs/tiny --shots 2", USAGE, r"--task-folder and --shots are for --tasks; .*"),
    ("eval runs/tiny --lambada none.jsonl", BAD, r"there is no file none\.jsonl"),
    ("eval runs/tiny --lambada broken.jsonl", BAD, r"broken\.jsonl, line 2 is not JSON: .*"),
    ("eval runs/tiny --hellaswag tale.txt", BAD, r"tale\.txt: examples are read from \.jsonl, .*"),
    ("eval data/tale --all-checkpoints", BAD, r"data/tale is no run with checkpoints; .*"),
    ("merge", USAGE, r"name the models to merge, .*"),
    ("merge runs/tiny", USAGE, r"name the run that comes of it: --out FOLDER.*"),
    ("merge runs/tiny --out runs/x --weights 1,2", USAGE, r"--weights 1,2 are 2, the models 1; give one for each"),
    ("merge runs/tiny --out runs/x --weights one", USAGE, r"--weights one are not numbers with commas between them"),
    ("merge runs/tiny runs/tiny --out runs/x --weights 1e308,1e308", USAGE, r"the weights add up to inf; .*"),
    ("merge runs/tiny --out runs/x --base runs/torn", BAD, r".*runs/torn.*"),
    ("merge runs/tny --out runs/x", BAD, r"there is no runs/tny; did you mean 'tiny'\?"),
    ("merge runs/tiny --out runs/tiny --force", USAGE, r"--out runs/tiny holds a model that is merged; .*"),
    ("merge runs/tiny --out data/tale --force", BAD, r"data/tale is no run, and is not replaced; .*"),
    ("diff runs/tiny", USAGE, r"Missing argument 'B'; .*"),
    ("diff runs/tiny runs/torn", BAD, r".*runs/torn.*"),
    ("diff runs/tiny runs/tiny --out data", USAGE, r"--out data is a folder; .*"),
    ("chat runs/tiny --temperature -1", USAGE, r".*temperature.*-1.*"),
    ("sample runs/tiny --top-p 7", USAGE, r".*top_p=7.*"),
    ("sample runs/tiny --slide --max-new-tokens 0", USAGE, r"--slide has no end of its own; give --max-new-tokens .*"),
    ("sample runs/tiny --slide --keep 999", USAGE, r"keep=999 and half of a context of .* keep \d+ or fewer"),
    ("sample runs/tiny --speculate runs/tny", BAD, r"there is no runs/tny; did you mean 'tiny'\?"),
    ("serve runs/tiny --max-tokens 0", USAGE, r".*'--max-tokens': 0 is not in the range .*"),
    ("serve runs/tiny --speculate runs/torn", BAD, r".*runs/torn.*"),
    ("chat runs/tiny --speculate runs/none", BAD, r"there is no runs/none.*"),
    ("sample runs/tiny --prompt FILE:none.txt", FAILURE, r"none\.txt: No such file or directory"),
    ("sample runs/tiny --prompt FILE:latin1.txt", BAD, r"latin1\.txt.*UTF-8.*"),
]  # fmt: skip


LINES = [str(getattr(row, "values", row)[0]) for row in MISTAKES]


@pytest.fixture(scope="session")
def prepared_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts good and bad, prepared data whole and torn, a run that was trained, a torn and an empty one."""
    here = tmp_path_factory.mktemp("mistakes")
    (here / "tale.txt").write_text("Once upon a time there was a text. " * 100, encoding="utf-8")
    (here / "empty.txt").touch()
    (here / "latin1.txt").write_bytes("dér".encode("latin-1"))
    (here / "latin1.yaml").write_bytes("lr: 'ä'\n".encode("latin-1"))
    (here / "broken.toml").write_text("lr = = 3\n")
    (here / "odd.yaml").write_text("train:\n  lrr: 3\n")
    (here / "broken.jsonl").write_text('{"text": "good"}\n{"text": "bad\n')
    for name in ("deep.json", "deep.jsonl"):
        (here / name).write_text("[" * 100_000 + "]" * 100_000)
    (here / "digits.jsonl").write_text('{"text": "good"}\n{"text": ' + "9" * 5000 + "}\n")
    (here / "silent.jsonl").write_text('{"messages": [{"role": "user", "content": "anybody?"}]}\n' * 2)
    (here / "torn.parquet").write_bytes(b"PAR1 and no more")
    (here / "runs" / "empty").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        # its settings are of the whole process
        patch.setattr(importlib.import_module("cli.carrying"), "tune_cpu", lambda: None)
        succeed("prepare", "tale.txt", "--tokenizer", "char")
        succeed("prepare", "tale.txt", "--tokenizer", "byte", "--out", "data/bytes")
        succeed("train", "demo", "data/tale", "--out", "runs/tiny", "--quiet", *TINY)
    torn = {"data/tale": "train.bin", "runs/tiny": "checkpoints/*/params.safetensors"}
    for whole, pattern in torn.items():
        copy = shutil.copytree(here / whole, (here / whole).with_name("torn"))
        for file in copy.glob(pattern):
            os.truncate(file, file.stat().st_size // 2)
    return here


def succeed(*words: str) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    assert left.value.code == 0


@pytest.fixture
def workplace(prepared_once: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a mistake, which must change nothing there."""
    monkeypatch.chdir(prepared_once)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    return prepared_once


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Nothing in the folder is made, removed or written."""
    before = listing(folder)
    yield
    assert listing(folder) == before


def listing(folder: Path) -> dict[str, tuple[int, int] | None]:
    """Size and time of every file, and None for every folder, whose time a temporary file changes."""
    found = sorted(folder.rglob("*"))
    return {str(p): None if p.is_dir() else (p.stat().st_size, p.stat().st_mtime_ns) for p in found}


def the_error(code: int | str | None, expected: int, out: str, err: str) -> str:
    """The one line of an error, without its beginning. What is noted before it on the way is allowed."""
    assert "Traceback" not in err, err
    (line,) = (line for line in err.splitlines() if line.startswith("error:"))
    assert line == err.splitlines()[-1]
    assert (code, out) == (expected, ""), err
    assert len(line) < 400, "too long to be read"
    return line.removeprefix("error: ")


@pytest.mark.parametrize(("words", "code", "says"), MISTAKES, ids=LINES)
def test_a_mistake_is_one_line_and_a_code(
    words: str, code: int, says: str, workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with unchanged(workplace), pytest.raises(SystemExit) as left:
        cli.main(words.split(" "))  # two spaces, or one at the end: an empty word
    line = the_error(left.value.code, code, *capfd.readouterr())
    assert re.fullmatch(says, line), line


@pytest.mark.parametrize(("name", "says"), [("gtp2", "did you mean 'gpt2'"), ("char:", "the text it was trained on")])
def test_a_tokenizer_that_an_import_cannot_have(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        importlib.import_module("cli.import").tokenizer_for(None, name)


def test_every_command_has_mistakes() -> None:
    assert {line.split()[0] for line in LINES} >= set(COMMANDS) - {"bench"}


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_tracker_that_is_not_installed(
    name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for module in (name, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with unchanged(workplace), pytest.raises(SystemExit) as left:
        cli.main(["train", "demo", "data/tale", "--out", f"runs/{name}", "--track", name, *TINY])
    line = the_error(left.value.code, USAGE, *capfd.readouterr())
    assert line.startswith(f"tracker '{name}' needs its package: pip install 'fnlm[{name}]'")


def test_parquet_without_its_package(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with unchanged(workplace), pytest.raises(SystemExit) as left:
        cli.main(["prepare", "torn.parquet"])
    line = the_error(left.value.code, BAD, *capfd.readouterr())
    assert line == "torn.parquet: reading .parquet needs pyarrow: pip install 'fnlm[parquet]', or convert to .jsonl"


# As a user runs them


def process(here: Path, *words: str, longest_file: int | None = None) -> subprocess.CompletedProcess[str]:
    """A command; with `longest_file`, on a disk where no file gets longer than so many bytes."""

    def limited() -> None:
        if longest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (longest_file, longest_file))

    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "cli", *words],
        cwd=here, env=env, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, preexec_fn=limited,
        restore_signals=False,  # or the signal of a file that is too long would end it without an error
    )  # fmt: skip


def test_a_port_in_use(workplace: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, unchanged(workplace):
        port = server.getsockname()[1]
        done = process(workplace, "serve", "runs/tiny", "--port", str(port), "--no-open")
    line = the_error(done.returncode, FAILURE, done.stdout, done.stderr)
    assert line == f"port {port} is in use; choose another with --port {port + 1 if port < 65535 else 8000}"


def test_a_full_disk_ends_a_preparation(workplace: Path) -> None:
    words = ["prepare", "tale.txt", "--tokenizer", "char", "--out", "data/full"]
    with unchanged(workplace):
        done = process(workplace, *words, longest_file=2048)
    line = the_error(done.returncode, FAILURE, done.stdout, done.stderr)
    assert line == "data/full: File too large"


def test_a_full_disk_ends_a_run_that_cannot_be_saved(prepared_once: Path) -> None:
    words = ["train", "demo", "data/tale", "--out", "runs/full", "--quiet", *TINY]
    done = process(prepared_once, *words, longest_file=20_000)
    line = the_error(done.returncode, FAILURE, done.stdout, done.stderr)
    assert re.fullmatch(r"cannot save runs/full/checkpoints/\d{8}: File too large", line)


def test_a_full_disk_behind_stdout(workplace: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cli", "--help"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (FAILURE, "error: No space left on device\n")
