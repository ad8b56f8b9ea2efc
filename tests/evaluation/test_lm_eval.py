"""Our adapter and lm-eval's own hf backend say the same of one exported model, on local tasks of each kind."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import fnlm
from fnlm import evaluation, interop, tokenizers, trained
from fnlm.generate import complete
from fnlm.sampling import Settings

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # theirs are not ours to mend

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "more", "bird", "in", "the", "tall", "old", "tree"]
HEAD = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {file}\ntest_split: test\n"
CHOICE = (
    'task: t_choice\noutput_type: multiple_choice\ndoc_to_text: "Q: {{{{q}}}}\\nA:"\ndoc_to_choice: "{{{{choices}}}}"\n'
    'doc_to_target: "{{{{label}}}}"\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n' + HEAD
)
ROLLING = (
    'task: t_rolling\noutput_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{{{text}}}}"\nmetric_list:'
    "\n  - metric: word_perplexity\n  - metric: byte_perplexity\n  - metric: bits_per_byte\n" + HEAD
)
UNTIL = (
    'task: t_until\noutput_type: generate_until\ndoc_to_text: "{{{{q}}}}"\ndoc_to_target: "{{{{a}}}}"\n'
    'generation_kwargs:\n  until: ["a", "\\n\\n"]\n  max_gen_toks: 12\nmetric_list:\n  - metric: exact_match\n' + HEAD
)
LAMBADA = (
    "task: t_lambada\noutput_type: loglikelihood\ndoc_to_text: \"{{{{text.split(' ')[:-1]|join(' ')}}}}\"\n"
    "doc_to_target: \"{{{{' '+text.split(' ')[-1]}}}}\"\nmetric_list:\n  - metric: perplexity\n"
    "    aggregation: perplexity\n    higher_is_better: false\n  - metric: acc\n" + HEAD
)
HELLASWAG = (
    "task: t_hellaswag\noutput_type: multiple_choice\nprocess_docs: !function lm_eval_hellaswag.process_docs\n"
    'doc_to_text: "{{{{query}}}}"\ndoc_to_target: "{{{{label}}}}"\ndoc_to_choice: "choices"\n'
    "metric_list:\n  - metric: acc\n  - metric: acc_norm\n" + HEAD
)
TASKS = {"t_choice": CHOICE, "t_rolling": ROLLING, "t_until": UNTIL, "t_lambada": LAMBADA, "t_hellaswag": HELLASWAG}


def sentence(seed: int, n: int) -> str:
    """Without a period: lm-eval takes windows of equal ids for one, whatever part of them is counted."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(n))


def rows(model: trained.Trained) -> dict[str, list[dict[str, Any]]]:
    """Examples of each kind, some longer than the context; half of the answers are what the model writes."""
    many = range(24)
    endings = [[sentence(4 * i + j, 2 + (i + j) % 5) for j in range(4)] for i in many]
    asked = [sentence(i, 3 + i % 9) for i in many]
    settings = Settings(temperature=0.0, max_tokens=12, stop=("a", "\n\n"))
    own = [[*model.tokenizer.prefix, *model.tokenizer.encode(q)] for q in asked]
    said = complete(model.params, model.cfg, model.tokenizer, own, settings, fnlm.key(0))
    right = [text.text.lstrip() if i % 2 else "no" for i, text in enumerate(said)]
    label = "Sitting"
    return {
        "t_choice": [{"q": sentence(i, 4 + i), "choices": endings[i], "label": i % 4} for i in many],
        "t_rolling": [{"text": sentence(i, 2 + 29 * i).capitalize() + "."} for i in many],
        "t_until": [{"q": q, "a": a} for q, a in zip(asked, right, strict=True)],
        "t_lambada": [{"text": sentence(i, 5 + 3 * i) + (" ha\u0308t" if i == 3 else "")} for i in many],
        "t_hellaswag": [
            {"activity_label": label, "ctx_a": sentence(i, 6) + " [header] x [title] Y.", "ctx_b": sentence(i, 3),
             "endings": [f"{e} [step]  then" for e in endings[i]], "label": str(i % 4)}
            for i in many
        ],
    }  # fmt: skip


def small(folder: Path, name: str, test_data: Path) -> trained.Trained:
    """A model of ours with a home at Hugging Face's, and its exported folder."""
    if name == "stories260K":
        model = trained.load(test_data / "weights" / "stories260K" / "stories260K.bin")
    else:
        tokenizer = tokenizers.named("byte")
        cfg = fnlm.ModelConfig(
            vocab_size=tokenizer.vocab_size, n_layers=2, n_heads=2, d_model=32, seq_len=64, bias=True
        )
        params = {k: 4 * v for k, v in fnlm.init_params(cfg, fnlm.key(1)).items()}
        model = trained.Trained(cfg, params, tokenizer, folder, 0, {}, {"kind": "text"})
    interop.to_hf(interop.Model(model.cfg, model.params, model.tokenizer, model.config), folder)
    return model


def written(folder: Path, model: trained.Trained) -> None:
    """YAML files of the tasks, and their data."""
    source = (Path(__file__).parent / "lm_eval_hellaswag.py").read_text(encoding="utf-8")
    (folder / "lm_eval_hellaswag.py").write_text(source, encoding="utf-8")
    for task, examples in rows(model).items():
        file = folder / f"{task}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in examples), encoding="utf-8")
        (folder / f"{task}.yaml").write_text(TASKS[task].format(file=file), encoding="utf-8")


@pytest.mark.parametrize("name", ["stories260K", "byte"])
def test_the_numbers_of_its_hf_backend(name: str, test_data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    for package in ("lm_eval", "transformers", "datasets", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; pip install 'fnlm[eval]'")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from fnlm.evaluation import harness

    model = small(tmp_path / "hf", name, test_data)
    written(tmp_path, model)
    adapter = harness.Adapter(model.params, model.cfg, model.tokenizer)
    ours = harness.run(adapter, list(TASKS), tmp_path)
    theirs = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", batch_size=4, dtype="float32")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    said = simple_evaluate(theirs, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)["results"]
    compared = 0
    for task in TASKS:
        for metric, value in said[task].items():
            if isinstance(value, float):
                own = ours[task][metric.removesuffix(",none")]
                print(f"{name} {task} {metric}: ours {own:.6f} theirs {value:.6f}")
                assert own == pytest.approx(value, rel=1e-4, abs=1e-4), (task, metric)
                compared += 1
    assert compared >= 9
    assert 0 < ours["t_until"]["exact_match"] < 1 and ours["t_choice"]["acc"] > 0
    for task, figures in built_in(model, tmp_path).items():
        for metric, value in figures.items():
            if not metric.endswith("stderr"):
                assert value == pytest.approx(said[task][f"{metric},none"], rel=1e-4, abs=1e-4), (task, metric)


def built_in(model: trained.Trained, folder: Path) -> dict[str, dict[str, float]]:
    """LAMBADA and HellaSwag without lm-eval, from the same files."""
    found = {}
    for task in ("lambada", "hellaswag"):
        examples = evaluation.TASKS[task][0](folder / f"t_{task}.jsonl")
        said = evaluation.measured(task, model.params, model.cfg, model.tokenizer, examples)
        found[f"t_{task}"] = said.figures
    return found


def test_an_unknown_task_is_named(tmp_path: Path) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed; pip install 'fnlm[eval]'")
    from fnlm.evaluation import harness

    cfg = fnlm.ModelConfig(vocab_size=259, n_layers=1, n_heads=2, d_model=16, seq_len=16)
    adapter = harness.Adapter(fnlm.init_params(cfg, fnlm.key(0)), cfg, tokenizers.named("byte"))
    with pytest.raises(ValueError, match="there is no task 'lamda_openai' among lm-eval's"):
        harness.run(adapter, ["lamda_openai"], tmp_path)
    assert torch.is_grad_enabled()
