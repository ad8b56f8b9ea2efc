"""A config.json of Hugging Face's, read with the care that other people's files need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fnlm.checkpoint.files import CheckpointError
from fnlm.config import ModelConfig

SCALINGS = ("none", "linear", "llama3", "yarn", "dynamic")


class Described(NamedTuple):
    """The values of a config.json, and where it lies. What is missing has its family's default."""

    values: dict[str, Any]
    path: Path

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1. CheckpointError for anything else."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self.path}: {name}={value!r} must be a whole number of at least 1")
        return value

    def number(self, name: str, default: float) -> float:
        """A number. CheckpointError for anything else."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CheckpointError(f"{self.path}: {name}={value!r} must be a number")
        return float(value)

    def get(self, name: str, default: Any = None) -> Any:
        """A value, or the default where there is none or null."""
        value = self.values.get(name)
        return default if value is None else value

    def chosen(self, name: str, default: str, known: dict[str, Any]) -> Any:
        """What a value stands for. CheckpointError, with those known, for another."""
        value = self.get(name, default)
        if value not in known:
            raise CheckpointError(f"{self.path}: {name}={value!r} is not supported; supported: {', '.join(known)}")
        return known[value]

    def must(self, **wanted: Any) -> None:
        """Raises CheckpointError, by name, unless each option has this value or is left out."""
        for name, only in wanted.items():
            if self.get(name, only) != only:
                raise CheckpointError(f"{self.path}: {name}={self.get(name)!r} is not supported; only {only!r} is")

    def model(self, **fields: Any) -> ModelConfig:
        """Our config. CheckpointError where the values do not go together."""
        try:
            cfg = ModelConfig(**fields)
            turned = int(cfg.head_dim * cfg.rope_fraction)  # they round down
            return cfg if turned == cfg.rope_dim else replace(cfg, rope_fraction=turned / cfg.head_dim)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{self.path}: {error}") from error


def rope_of(
    c: Described, fraction: tuple[str, float] = ("partial_rotary_factor", 1.0), base: str = "rope_theta"
) -> dict[str, Any]:
    """The fields of ours that say how positions are rotated, from either form that transformers has had.

    CheckpointError for a scaling, or an option of one, that is not computed here. "dynamic" only begins beyond the
    context, so up to it nothing is scaled.
    """
    both = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    inner = Described({k: v for k, v in both.items() if v is not None}, c.path)
    theta = inner.number("rope_theta", c.number(base, 10000.0))
    part = inner.number("partial_rotary_factor", c.number(*fraction))
    kind = inner.get("rope_type", inner.get("type", "default"))
    kind = inner._replace(values={"rope_type": kind}).chosen(
        "rope_type", "default", {"default": "none"} | {s: s for s in SCALINGS[1:]}
    )
    out: dict[str, Any] = {"rope_theta": theta, "rope_fraction": part}
    if kind in ("none", "dynamic"):
        return out
    out |= {"rope_scaling": kind, "rope_factor": inner.number("factor", 1.0)}
    if kind == "llama3":
        return out | {
            "rope_original": inner.whole("original_max_position_embeddings"),
            "rope_low": inner.number("low_freq_factor", 1.0),
            "rope_high": inner.number("high_freq_factor", 4.0),
        }
    if kind == "yarn":
        inner.must(attention_factor=None, mscale=None, mscale_all_dim=None, truncate=True)
        before = inner.whole("original_max_position_embeddings", c.whole("max_position_embeddings"))
        low, high = inner.number("beta_slow", 1.0), inner.number("beta_fast", 32.0)
        return out | {"rope_original": before, "rope_low": low, "rope_high": high}
    return out


def rope_to(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `rope_of`, without the fraction, in the form that all versions of transformers read."""
    out: dict[str, Any] = {"rope_theta": cfg.rope_theta, "rope_scaling": None}
    if cfg.rope_scaling == "none":
        return out
    scaling: dict[str, Any] = {"rope_type": cfg.rope_scaling, "factor": cfg.rope_factor}
    low, high = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_slow", "beta_fast")}.get(
        cfg.rope_scaling, ("", "")
    )
    if low:
        scaling |= {low: cfg.rope_low, high: cfg.rope_high, "original_max_position_embeddings": cfg.rope_original}
    return out | {"rope_scaling": scaling}
