"""The step benchmark: its protocol, arithmetic and refusals; nothing here looks at a clock."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch

from fnlm import benchmark, benchmark_contestants, benchmark_report, benchmark_worker, params
from fnlm.benchmark import Contestant, Shape
from fnlm.config import ModelConfig

FAKE = '''
import torch

def build(job, weights):
    """Weights that shrink by the same factor each step; the loss is what the option says."""
    w, loss = torch.ones(2, 3), job["options"].get("loss", 1.5)
    def step(batch):
        print("libraries print to stdout")
        w.mul_(0.5)
        return torch.tensor(loss + (batch[0].shape != batch[1].shape))
    return (lambda x, y: (x, y)), step, lambda: [w, torch.ones(4)]

def broken(job, weights):
    raise KeyError("no such kernel")
'''
TINY = Shape(n_layers=2, n_heads=2, d_model=8, seq_len=4, batch_size=2, vocab_size=11, rounds=2, steps=3)


@pytest.fixture
def fake(tmp_path: Path) -> str:
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    return str(path)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmark.SHAPES, "tiny", TINY)


def ask(session_input: list[dict]) -> list[dict]:
    replies = io.StringIO()
    benchmark_worker.serve(io.StringIO("".join(json.dumps(r) + "\n" for r in session_input)), replies)
    return [json.loads(line) for line in replies.getvalue().splitlines()]


def job(fake: str, **options: float) -> dict:
    shape = TINY.sizes()
    return {
        "run": f"{fake}:build",
        "shape": shape,
        "precision": "fp32",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "spawned": 0.0,
        "options": options,
    }


@pytest.fixture
def no_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_worker, "_reset_rss", lambda: False)


@pytest.mark.usefixtures("no_reset")
def test_protocol_answers_each_request_once(fake: str) -> None:
    ready, first, more, norm, memory = ask(
        [{"build": job(fake, loss=2.0)}, {"steps": 1}, {"steps": 3}, {"norm": None}, {"memory": None}]
    )
    assert ready["versions"]["torch"] == torch.__version__
    assert first["losses"] == [2.0]
    assert {"first_step_s", "first_loss_s"} <= first.keys()
    assert more["losses"] == [2.0] * 3
    assert len(more["seconds"]) == len(more["cpu"]) == 3
    assert "first_step_s" not in more
    assert norm == {"matrix_norm": pytest.approx(math.sqrt(6) / 2**4), "vector_norm": 2.0}
    assert memory["peak_mb"] is None  # it could not be reset, so no steady peak is claimed
    assert memory["idle_cpu"] >= 0


def test_tokens_are_a_function_of_the_step() -> None:
    shape = TINY.sizes()
    (x, y), (again, _), (other, _) = (benchmark_worker.tokens_at(s, shape) for s in (3, 3, 4))
    assert x.shape == y.shape == (TINY.batch_size, TINY.seq_len)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    assert 0 <= int(x.min()) <= int(x.max()) < TINY.vocab_size


def nanogpt_state(n_layers: int, d: int, vocab: int, seq_len: int) -> dict[str, torch.Tensor]:
    state = {"transformer.wte.weight": torch.randn(vocab, d), "transformer.wpe.weight": torch.randn(seq_len, d)}
    for i in range(n_layers):
        rows = {"ln_1": (d,), "attn.c_attn": (3 * d, d), "attn.c_proj": (d, d), "ln_2": (d,)}
        rows |= {"mlp.c_fc": (4 * d, d), "mlp.c_proj": (d, 4 * d)}
        state |= {f"transformer.h.{i}.{name}.weight": torch.randn(shape) for name, shape in rows.items()}
    return state | {"transformer.ln_f.weight": torch.randn(d)}


def to_nanogpt(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {"embed.tokens": "wte", "embed.positions": "wpe", "norm": "ln_f"}
    inner = {"attn_norm": "ln_1", "attn.out": "attn.c_proj", "mlp_norm": "ln_2", "mlp.up": "mlp.c_fc"}
    inner |= {"mlp.down": "mlp.c_proj"}
    out = {}
    for name, p in ours.items():
        stem = name.removesuffix(".weight")
        if stem in renamed:
            out[f"transformer.{renamed[stem]}.weight"] = p
            continue
        _, i, rest = stem.split(".", 2)
        if rest in inner:
            out[f"transformer.h.{i}.{inner[rest]}.weight"] = p
        elif rest == "attn.q":
            qkv = [ours[f"blocks.{i}.attn.{x}.weight"] for x in "qkv"]
            out[f"transformer.h.{i}.attn.c_attn.weight"] = torch.cat(qkv)
    return out


def test_weights_survive_the_way_there_and_back() -> None:
    state = nanogpt_state(n_layers=3, d=8, vocab=11, seq_len=4)
    back = to_nanogpt(benchmark_contestants.from_nanogpt(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_mapped_weights_are_what_our_model_has() -> None:
    cfg = ModelConfig(n_layers=3, n_heads=2, d_model=8, vocab_size=11, seq_len=4)
    ours = benchmark_contestants.from_nanogpt(nanogpt_state(n_layers=3, d=8, vocab=11, seq_len=4))
    assert {name: tuple(p.shape) for name, p in ours.items()} == params.shapes(cfg)


def test_speed_ratio_is_the_median_over_rounds_of_ratios_of_medians() -> None:
    own = [[1.0, 1.0, 9.0], [2.0, 2.0, 2.0], [1.0, 1.0, 1.0]]
    other = [[3.0, 3.0, 3.0], [2.0, 2.0, 50.0], [5.0, 5.0, 5.0]]
    assert benchmark_report.speed_ratios(own, other) == {"median": 3.0, "min": 1.0, "max": 5.0}


def test_model_flops_count_matrices_and_half_the_attention() -> None:
    per_token = 2 * 12 * 8**2 + 11 * 8 + 2 * 4 * 8
    assert benchmark_report.model_flops(TINY) == 6 * 2 * 4 * per_token


def test_mfu_above_one_means_that_no_peak_is_known() -> None:
    turns, result = [{"seconds": [0.5, 0.5], "cpu": [1.0, 1.0]}], {}
    benchmark_report.add_speed(result, turns, TINY, gflops=benchmark_report.model_flops(TINY) / 1e9)
    assert result["mfu"] is None
    benchmark_report.add_speed(result, turns, TINY, gflops=benchmark_report.model_flops(TINY) / 1e9 * 4)
    assert result["mfu"] == pytest.approx(0.5)
    assert result["tokens_per_s"] == 16
    benchmark_report.add_speed(result, turns, TINY, gflops=None)
    assert result["mfu"] is None


def done(precision: str, loss: float, matrix: float = 14.0, vector: float = 30.0) -> dict:
    return {"precision": precision, "loss": loss, "matrix_norm": matrix, "vector_norm": vector}


@pytest.mark.parametrize(
    ("other", "complaints"),
    [
        (done("fp32", 4.000009), []),
        (done("fp32", 4.00002), ["loss"]),
        (done("bf16", 4.004), []),
        (done("bf16", 4.006), ["loss"]),
        (done("bf16", 4.0, matrix=14.0 * (1 + 2.4e-4)), ["matrix_norm"]),  # as without weight decay
        (done("fp32", 4.0, vector=30.0 * (1 - 2.4e-4)), ["vector_norm"]),  # as with decayed norms
        (done("bf16", math.nan), ["loss"]),
    ],
)
def test_unequal_work_is_named(other: dict, complaints: list[str]) -> None:
    found = benchmark_report.unequal_work({"a": done("fp32", 4.0), "b": other})
    assert [line.split()[1] for line in found] == complaints
    assert all(line.startswith("b: ") for line in found)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_report_names_the_one_that_did_other_work(fake: str) -> None:
    field = [Contestant(name, f"{fake}:build", "fp32") for name in ("one", "two")]
    field.append(Contestant("odd", f"{fake}:build", "fp32", {"loss": 1.6}))
    report = benchmark.step_benchmark(shapes=["tiny"], threads=1, field=field, log=lambda line: None)
    part = report["shapes"]["tiny"]
    assert not report["ok"]
    assert [line.split(":")[0] for line in part["unequal_work"]] == ["odd"]
    assert list(part["contestants"]) == ["one", "two", "odd"]
    one = part["contestants"]["one"]
    assert one["losses"] == [1.5] * 4
    assert len(one["step_ms_by_round"]) == TINY.rounds
    assert one["first_loss_s"] > one["first_step_s"] > 0 < one["step_ms"]
    assert part["peak_gflops"]["fp32"] > 0
    assert part["others_cores"] is None or part["others_cores"] >= 0
    assert json.loads(json.dumps(report)) == report
    part["others_cores"] = 1.5
    assert "others kept 1.5 cores busy" in benchmark.table(report)
    part["others_cores"] = None
    rows = benchmark.table(report).splitlines()
    assert rows[-1].startswith("UNEQUAL WORK, these figures mean nothing: odd: loss 1.600000 is not 1.500000 of one")
    assert len({len(row) for row in rows[3:-1]}) == 1


def test_ratios_are_against_the_yardsticks_only() -> None:
    results = {
        name: {"peak_mb": mb, "first_step_s": first, "first_loss_s": first + 1}
        for name, mb, first in (("nanogpt-best", 400.0, 20.0), ("fnlm", 300.0, 1.0))
    }
    turns = {"nanogpt-best": [{"seconds": [4.0]}] * 2, "fnlm": [{"seconds": [2.0]}, {"seconds": [1.0]}]}
    benchmark_report.compare(results, turns, ["nanogpt-best"])
    assert results["nanogpt-best"]["against"]["nanogpt-best"]["speed"]["median"] == 1
    ours = results["fnlm"]["against"]
    assert ours.keys() == {"nanogpt-best"}
    assert ours["nanogpt-best"]["speed"] == {"median": 3.0, "min": 2.0, "max": 4.0}
    assert ours["nanogpt-best"]["peak_memory"] == 0.75
    assert ours["nanogpt-best"]["first_step"] == 0.05


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_a_contestant_that_fails_is_an_error_with_its_log(fake: str) -> None:
    field = [Contestant("ill", f"{fake}:broken", "fp32")]
    with pytest.raises(RuntimeError, match=r"(?s)ill ended during 'build'.*no such kernel"):
        benchmark.step_benchmark(shapes=["tiny"], threads=1, field=field, log=lambda line: None)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model\.py in .*clone"):
        benchmark.step_benchmark(str(tmp_path))
    with pytest.raises(ValueError, match=r"unknown shape 'gpt9'; choose from shakespeare-char-cpu"):
        benchmark.step_benchmark(shapes=["gpt9"])
    with pytest.raises(ValueError, match="cannot import"):
        benchmark_worker.function_at(f"{tmp_path}/model.txt:build")


def test_the_usual_field() -> None:
    assert [c.name for c in benchmark.contestants("/nanoGPT", "fp32", compiled=True)] == [
        "nanogpt-default",
        "nanogpt-best",
        "fnlm",
        "fnlm-compiled",
    ]
    assert [c.name for c in benchmark.contestants(None)] == ["fnlm"]
