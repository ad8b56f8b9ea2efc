"""Schedules at their corners, and the same for Python and tensor counts."""

import pytest
import torch

from fnlm import optim
from fnlm.config import TrainConfig
from fnlm.presets import schedule_of

SCHEDULES = {
    "constant": optim.constant(0.3),
    "linear": optim.linear(1.0, 0.0, 10),
    "warmup_cosine": optim.warmup_cosine(1.0, 4, 20, 0.1),
    "no_warmup": optim.warmup_cosine(1.0, 0, 20),
    "warmup_linear": optim.warmup_linear(1.0, 4, 20),
    "warmup_stable_decay": optim.warmup_stable_decay(1.0, 4, 20, 6, 0.1),
    "inverse_sqrt": optim.inverse_sqrt(1.0, 4),
    "at_most": optim.at_most_inverse_sqrt(optim.constant(0.5)),
    "join": optim.join([optim.linear(0.0, 1.0, 4), optim.constant(1.0), optim.inverse_sqrt(1.0, 0)], [4, 9]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_tensor_count_gives_the_value_of_the_int_count(name):
    for count in range(30):
        value, tensor = SCHEDULES[name](count), SCHEDULES[name](torch.tensor(count))
        assert isinstance(value, float)
        assert tensor.shape == ()
        assert float(tensor) == pytest.approx(value, rel=1e-14)
    many = torch.vmap(SCHEDULES[name])(torch.arange(30))
    assert many.tolist() == pytest.approx([SCHEDULES[name](t) for t in range(30)])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("constant", {0: 0.3, 99: 0.3}),
        ("linear", {0: 1.0, 5: 0.5, 10: 0.0, 11: 0.0}),
        ("warmup_cosine", {0: 0.2, 3: 0.8, 4: 1.0, 12: 0.55, 20: 0.1, 99: 0.1}),
        ("no_warmup", {0: 1.0, 10: 0.5, 20: 0.0}),
        ("warmup_linear", {0: 0.2, 4: 1.0, 12: 0.5, 20: 0.0, 99: 0.0}),
        ("warmup_stable_decay", {0: 0.2, 4: 1.0, 14: 1.0, 17: 0.55, 20: 0.1, 99: 0.1}),
        ("inverse_sqrt", {0: 0.2, 4: 1.0, 19: 0.5, 79: 0.25}),
        ("at_most", {0: 0.5, 3: 0.5, 24: 0.2}),
        ("join", {0: 0.0, 2: 0.5, 4: 1.0, 8: 1.0, 9: 1.0, 12: 0.5}),
    ],
)
def test_corners(name, values):
    assert {t: SCHEDULES[name](t) for t in values} == pytest.approx(values)


def test_a_tensor_count_does_not_recompile():
    schedule = optim.warmup_cosine(1.0, 4, 20)
    graphs = []

    def count_graphs(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(schedule, backend=count_graphs, fullgraph=True)
    values = [float(compiled(torch.tensor(t))) for t in range(0, 24, 3)]
    assert values == pytest.approx([schedule(t) for t in range(0, 24, 3)])
    assert len(graphs) == 1


@pytest.mark.parametrize(("steps", "warmup", "decay"), [(1, 0, 1), (2, 0, 1), (4, 3, 1), (10, 9, 1), (20, 2, 4)])
def test_the_usual_decay_fits_any_run(steps, warmup, decay):
    schedule = schedule_of(TrainConfig(steps=steps, batch_size=1, warmup=warmup, schedule="wsd", lr=1.0), 1.0)
    wanted = optim.warmup_stable_decay(1.0, warmup, steps, decay)
    assert [schedule(t) for t in range(steps + 1)] == [wanted(t) for t in range(steps + 1)]
    assert (schedule(steps - 1), schedule(steps)) == (pytest.approx(1 / decay), 0.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.constant(-0.5), r"value=-0.5 is not a learning rate"),
        (lambda: optim.warmup_cosine(-1.0, 0, 10), r"peak=-1.0"),
        (lambda: optim.warmup_cosine(1.0, -1, 10), r"warmup=-1 is negative"),
        (lambda: optim.warmup_cosine(1.0, 10, 10), r"choose total > warmup"),
        (lambda: optim.warmup_cosine(1.0, 1, 10, floor=2.0), r"floor=2.0 is outside \[0, peak=1.0\]"),
        (lambda: optim.warmup_linear(1.0, 10, 10), r"choose total > warmup"),
        (lambda: optim.warmup_stable_decay(1.0, 4, 20, 17), r"decay=17 does not fit .* choose 1 to 16"),
        (lambda: optim.linear(1.0, 0.0, 0), r"steps=0"),
        (lambda: optim.inverse_sqrt(1.0, -1), r"warmup=-1"),
        (lambda: optim.join([optim.constant(1.0)], [3]), r"1 schedules need 0 increasing boundaries, not \[3\]"),
        (lambda: optim.join([optim.constant(1.0)] * 3, [3, 3]), r"increasing boundaries"),
    ],
)
def test_bad_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
