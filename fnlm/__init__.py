"""fnlm: a language model is a pure function of a dict of parameters; everything else transforms such dicts."""

from fnlm import optim, random, tree
from fnlm.config import Compute, ModelConfig, TrainConfig, override
from fnlm.forward import forward
from fnlm.lift import as_module, from_module, from_stateful_module, stack
from fnlm.losses import cross_entropy, lm_loss, make_lm_loss
from fnlm.machine import tune_cpu
from fnlm.params import count, flops_per_token, init_params, is_hidden_matrix, is_matrix, mup_lr_scale, shapes
from fnlm.presets import FINETUNING, PRESETS, TRAINING
from fnlm.random import fold_in, key, split
from fnlm.step import Plan, init_state, make_step, value_and_grad
from fnlm.types import Batch, Key, Params, TrainState, Transform

__version__ = "0.1.0"

__all__ = [
    "FINETUNING",
    "PRESETS",
    "TRAINING",
    "Batch",
    "Compute",
    "Key",
    "ModelConfig",
    "Params",
    "Plan",
    "TrainConfig",
    "TrainState",
    "Transform",
    "as_module",
    "count",
    "cross_entropy",
    "flops_per_token",
    "fold_in",
    "forward",
    "from_module",
    "from_stateful_module",
    "init_params",
    "init_state",
    "is_hidden_matrix",
    "is_matrix",
    "key",
    "lm_loss",
    "make_lm_loss",
    "make_step",
    "mup_lr_scale",
    "optim",
    "override",
    "random",
    "shapes",
    "split",
    "stack",
    "tree",
    "tune_cpu",
    "value_and_grad",
]
