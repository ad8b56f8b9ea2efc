"""Optimizers as pure transforms of flat dicts: links, `chain`, recipes, schedules, and `in_place` for speed.

>>> optimizer = chain(clip=clip_by_global_norm(1.0), adam=scale_by_adam(), lr=scale(-1e-3))
>>> updates, state = optimizer.update(grads, state, params)
>>> params = apply_updates(params, updates)
"""

from fnlm.optim.adafactor import scale_by_adafactor
from fnlm.optim.adam import scale_by_adam
from fnlm.optim.base import (
    Needs,
    Rule,
    apply_updates,
    chain,
    masked,
    needs,
    partition,
    rewrite,
    transform,
)
from fnlm.optim.clip import ClipByGlobalNorm, clip_by_global_norm, clip_by_value, global_norm
from fnlm.optim.decay import add_decayed_weights
from fnlm.optim.ema import ema_params
from fnlm.optim.fused import InPlace, in_place
from fnlm.optim.lion import scale_by_lion
from fnlm.optim.muon import newton_schulz, scale_by_muon
from fnlm.optim.recipes import adafactor, adam, adamw, lion, muon, sgd
from fnlm.optim.scale import scale, scale_by_name, scale_by_schedule, scale_by_value, with_value
from fnlm.optim.schedules import (
    Schedule,
    at_most_inverse_sqrt,
    constant,
    inverse_sqrt,
    join,
    linear,
    warmup_cosine,
    warmup_linear,
    warmup_stable_decay,
)
from fnlm.optim.sgd import trace

__all__ = [
    "scale_by_adafactor",
    "scale_by_adam",
    "Needs",
    "Rule",
    "apply_updates",
    "chain",
    "masked",
    "needs",
    "partition",
    "rewrite",
    "transform",
    "ClipByGlobalNorm",
    "clip_by_global_norm",
    "clip_by_value",
    "global_norm",
    "add_decayed_weights",
    "ema_params",
    "InPlace",
    "in_place",
    "scale_by_lion",
    "newton_schulz",
    "scale_by_muon",
    "adafactor",
    "adam",
    "adamw",
    "lion",
    "muon",
    "sgd",
    "scale",
    "scale_by_name",
    "scale_by_schedule",
    "scale_by_value",
    "with_value",
    "Schedule",
    "at_most_inverse_sqrt",
    "constant",
    "inverse_sqrt",
    "join",
    "linear",
    "warmup_cosine",
    "warmup_linear",
    "warmup_stable_decay",
    "trace",
]
