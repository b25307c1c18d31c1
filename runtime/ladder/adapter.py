"""Read a PEFT LoRA folder: `adapter_config.json` + `adapter_model.safetensors`.

The first step of every request's set-up: files in, plain tensors out, nothing of the model touched yet. Every key of
the configuration is either used, known to matter in training only, or refused by name; silence about a feature that
changes the numbers is the failure this module exists to prevent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from policy.limits import Flag, Limit, Maybe, Number, Text, Whole, check_fields, limited, refused, shown
from policy.reading import read_json
from policy.rungs import LARGEST_RANK

from ..locate import is_hub_id

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

# These shape training or describe where the adapter came from. The tensors already say which modules it touches, and
# `fan_in_fan_out` describes the base weight's layout (Conv1D): A and B are [r, in] and [out, r] either way.
TRAINING_ONLY = {
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "target_modules", "exclude_modules",
    "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core", "loftq_config", "eva_config",
    "lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying", "fan_in_fan_out",
    "init_lora_weights", "bias",
}  # fmt: skip

# Initialisations that leave the base weights alone; the others (PiSSA, OLoRA, CorDA, LoftQ, ...) train against a base
# that they changed, so their A and B do not fit the plain base model.
PLAIN_INIT = (True, False, None, "gaussian", "orthogonal", "eva", "true", "false")


@dataclass(frozen=True)
class ByPattern(Limit):
    """A value by regular expression over module paths, in PEFT's order."""

    of: Limit

    def __str__(self) -> str:
        return f"by regular expression {self.of}"

    def take(self, name: str, value: Any) -> dict[re.Pattern[str], Any]:
        if not isinstance(value, Mapping):
            raise refused(name, self, value)
        return {self._compiled(name, key): self.of.take(f"{name}[{shown(key)}]", own) for key, own in value.items()}

    def _compiled(self, name: str, key: str) -> re.Pattern[str]:
        try:
            return re.compile(rf"(.*\.)?({key})$")
        except (re.error, RecursionError, OverflowError) as error:
            raise refused(name, "regular expressions", key, f"correct it ({error})") from None


RANK, ALPHA = Whole(1, LARGEST_RANK), Number(-1e6, 1e6)


@dataclass(frozen=True)
class LoraSettings:
    """What of PEFT's configuration changes the numbers; names and defaults are PEFT's."""

    r: int = field(default=8, metadata=limited(RANK))
    lora_alpha: float = field(default=8.0, metadata=limited(ALPHA))
    rank_pattern: dict[re.Pattern[str], int] | None = field(default=None, metadata=limited(Maybe(ByPattern(RANK))))
    alpha_pattern: dict[re.Pattern[str], float] | None = field(default=None, metadata=limited(Maybe(ByPattern(ALPHA))))
    use_rslora: bool | None = field(default=None, metadata=limited(Maybe(Flag())))
    base_model_name_or_path: str | None = field(default=None, metadata=limited(Maybe(Text(0))))

    def __post_init__(self) -> None:
        check_fields(self)

    def rank(self, module: str) -> int:
        """The rank of a module, by its path."""
        rank: int = _by_pattern(self.rank_pattern, module, self.r)
        return rank

    def scale(self, module: str) -> float:
        """What multiplies B A of a module: alpha / r, or alpha / sqrt(r) under rsLoRA."""
        rank = self.rank(module)
        alpha: float = _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (rank**0.5 if self.use_rslora else rank)


@dataclass(frozen=True)
class LoraFactors:
    """One adapted linear: its update is `scale * b @ a`."""

    a: Tensor
    """[r, d_in]"""
    b: Tensor
    """[d_out, r]"""
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Adapter:
    """A trained LoRA as it lies on disk, by module path in the base model."""

    path: Path
    base_model: str | None
    modules: dict[str, LoraFactors]

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(factors.rank for factors in self.modules.values())


def load_adapter(path: str | Path, revision: str | None = None) -> Adapter:
    """Read a PEFT LoRA folder, or a hub id, into CPU tensors of the stored dtype.

    Raises FileNotFoundError when folder or file is missing, ValueError for a feature this runtime does not apply, a
    truncated file, or tensors that contradict the configuration. Source of the format: PEFT, "PEFT checkpoint format".
    """
    folder = _resolve(path, revision)
    settings = _read_config(folder / CONFIG_NAME)
    tensors = _read_tensors(folder / WEIGHTS_NAME)
    return Adapter(folder, settings.base_model_name_or_path, _pair(tensors, settings, folder / WEIGHTS_NAME))


def _resolve(path: str | Path, revision: str | None) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    if "/" in str(path) and is_hub_id(path):  # an adapter's id always has an owner
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

        try:
            patterns = [CONFIG_NAME, WEIGHTS_NAME]
            return Path(snapshot_download(str(path), revision=revision, allow_patterns=patterns))
        except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(
                f"adapter: expected a folder or a hub id, got {str(path)!r}, which is no folder and could not be "
                f"fetched ({reason}); check the path or the connection"
            ) from None
    raise FileNotFoundError(
        f"adapter: expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, got {str(path)!r}; check the path"
    )


def _read_config(path: Path) -> LoraSettings:
    if not path.is_file():
        raise FileNotFoundError(f"adapter: expected {path}, found no such file; give a folder written by PEFT")
    config = read_json(path, "save the adapter again")
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind.upper() != "LORA":
        raise ValueError(f"{path}: expected peft_type LORA, got {shown(kind)}; only LoRA adapters have a rank ladder")
    used = {own.name: config[own.name] for own in fields(LoraSettings) if own.name in config}
    _refuse_unsupported(config, {"peft_type", *used}, path.parent)
    try:
        return LoraSettings(**used)
    except ValueError as error:
        raise ValueError(f"{path}: {error} or save the adapter again") from None


def _refuse_unsupported(config: dict[str, Any], used: set[str], folder: Path) -> None:
    features = [key for key, value in config.items() if value and key not in used | TRAINING_ONLY]
    if config.get("bias", "none") != "none":
        features.append("bias")
    if config.get("init_lora_weights", True) not in PLAIN_INIT:
        features.append("init_lora_weights")
    if features:
        named = ", ".join(f"{key}={shown(config[key])}" for key in sorted(features))
        raise ValueError(f"{folder}: expected a plain LoRA adapter, got {named}; merge or retrain it without")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"adapter: expected {path}, found no such file; save the adapter as safetensors")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected a whole safetensors file, got {error}; copy it again") from None


def _pair(tensors: dict[str, Tensor], settings: LoraSettings, path: Path) -> dict[str, LoraFactors]:
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"(?:{re.escape(PREFIX)})?(.+)\.lora_(A|B)(?:\.default)?\.weight", name)
        if match is None:
            raise ValueError(f"{path}: expected only lora_A and lora_B weights, got {name!r}; not a plain LoRA adapter")
        halves.setdefault(match[1], {})[match[2]] = tensor
    if not halves:
        raise ValueError(f"{path}: expected lora_A and lora_B weights, got an empty file; save the adapter again")
    return {name: _factors(name, half, settings, path) for name, half in sorted(halves.items())}


def _factors(name: str, half: dict[str, Tensor], settings: LoraSettings, path: Path) -> LoraFactors:
    if half.keys() != {"A", "B"}:
        raise ValueError(f"{path}: expected lora_A and lora_B of {name}, got only {sorted(half)}; save it again")
    a, b = half["A"], half["B"]
    rank = settings.rank(name)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise ValueError(
            f"{path}: expected rank {rank} for {name} ({CONFIG_NAME}), got lora_A {list(a.shape)} and "
            f"lora_B {list(b.shape)}; configuration and weights must come from one save"
        )
    if not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
        raise ValueError(f"{path}: expected finite weights for {name}, got NaN or infinity; train or copy it again")
    return LoraFactors(a, b, settings.scale(name))


def _by_pattern(patterns: Mapping[re.Pattern[str], Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the module path, or its tail after a dot, wins."""
    return next((value for pattern, value in (patterns or {}).items() if pattern.match(name)), default)
