"""What reading a published checkpoint takes: peak memory and seconds for a Hugging Face folder of GPT-2's size.

    python benchmarks/import_hf.py [--preset gpt2] [--dtype fp32] [--rounds 3] [--threads N] [--folder DIR]

Writes a folder with random parameters in the preset's shape (or takes --folder), then in a new process for each round:
`read` is `fnlm.interop.read(folder).load()`, all parameters in memory in our layout; `import` is what `fnlm import`
does, a run on disk with its sha256 as well. Peak memory is the process's largest resident size (VmHWM) less what it
had just before, with everything imported, over the bytes of the weights' files. The files are in the page cache.
Medians over rounds; the last line is JSON. Times on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import fnlm
from fnlm import interop, tokenizers
from fnlm.params import cast

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resident(field: str) -> int:
    """Bytes: VmRSS is what the process has now, VmHWM the most it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def measure(what: str, folder: Path, out: Path, threads: int) -> None:
    """In its own process: one JSON line with bytes and seconds."""
    torch.set_num_threads(threads)
    tokenizer = tokenizers.named("byte")
    torch.zeros(1) + 1  # torch's own start
    Path("/proc/self/clear_refs").write_text("5")
    before, began = resident("VmRSS"), time.perf_counter()
    model = interop.read(folder)
    if what == "read":
        kept = model.load()
        assert len(kept) > 1
    else:
        interop.write(model, tokenizer, out)
    seconds = time.perf_counter() - began
    print(json.dumps({"bytes": resident("VmHWM") - before, "seconds": seconds}))


def written(folder: Path, preset: str, dtype: str) -> None:
    cfg = fnlm.PRESETS[preset]
    params = cast(fnlm.init_params(cfg, fnlm.key(0)), DTYPES[dtype])
    config = {"kind": "text", "interop": {"format": "hf"}}  # so that all rows of the vocabulary are written
    interop.to_hf(interop.Model(cfg, params, tokenizers.named("byte"), config), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure[0], args.folder, Path(args.measure[1]), args.threads)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "hf"
        if args.folder is None:
            written(folder, args.preset, args.dtype)
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        row: dict[str, object] = {"folder": args.preset if args.folder is None else folder.name, "bytes": size}
        for what in ("read", "import"):
            found = []
            for i in range(args.rounds + 1):
                words = [sys.executable, __file__, "--folder", str(folder), "--threads", str(args.threads)]
                words += ["--measure", what, str(Path(temporary) / f"{what}{i}")]
                done = subprocess.run(words, check=True, capture_output=True, text=True)
                found.append(json.loads(done.stdout))
            for part in ("bytes", "seconds"):
                row[f"{what}_{part}"] = statistics.median(one[part] for one in found[1:])  # the first warms the cache
            peak, seconds = float(str(row[f"{what}_bytes"])) / size, float(str(row[f"{what}_seconds"]))
            print(f"{what}: {size / 1e6:.0f} MB, peak memory {peak:.2f} x its bytes, {seconds:.2f} s")
        print(json.dumps(row))


if __name__ == "__main__":
    main()
