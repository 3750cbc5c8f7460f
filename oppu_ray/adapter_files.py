"""An adapter outside the bank: `AdapterState` <-> one folder in plain PEFT format (the arrow `train_pack -> vault`).

In: the tensors and PEFT config that training hands out. Out: `adapter_config.json` and `adapter_model.safetensors`,
which `PeftModel.from_pretrained` loads unchanged. A reader might question that we read the files ourselves: PEFT 0.21
takes a partial state dict, wrong names and NaN without a word, and falls back to a pickle when the safetensors file is
missing. What is checked and parsed are bytes in memory: the vault hands over those whose checksum it has taken.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from oppu_ray.core import AdapterState
from oppu_ray.files import new_folder

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TENSOR_KEY = re.compile(r"base_model\.model\.(?P<module>.{1,256})\.(?P<part>lora_A\.weight|lora_B\.weight|ia3_l)")
PROMPT_KEY = "prompt_embeddings"
NUM_LAYOUTS = 64

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
Names = str | Sequence[str]

_COMMON_KEYS = {"peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode"}
_KEYS_OF_KIND = {
    "LORA": {"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "init_lora_weights"},
    "IA3": {"target_modules", "feedforward_modules", "init_ia3_weights"},
    "PROMPT_TUNING": {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads",
                      "num_layers", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"},
}  # fmt: skip
_DEFAULTS = {"bias": "none", "megatron_core": "megatron.core", "qalora_group_size": 16}
"""PEFT's defaults of all other options that are not null, false, zero or empty."""

_FLOAT_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # numpy has no bfloat16


def save_adapter(folder: Path, adapter: AdapterState) -> None:
    """Writes `encode_adapter`'s files as a new folder; either the whole folder appears, on disk, or nothing does.

    Args:
        folder: Must not exist yet, or be empty: an adapter is never overwritten.

    Raises:
        ValueError: As `encode_adapter`, or a folder that is already there.
    """
    files = encode_adapter(adapter, str(folder))
    with new_folder(folder) as partial:
        for name, data in files.items():
            (partial / name).write_bytes(data)


def encode_adapter(adapter: AdapterState, where: str) -> dict[str, bytes]:
    """The adapter's files by name, as PEFT loads them.

    Args:
        adapter: float32 arrays under PEFT's on-disk names. `peft_config` needs `peft_type`, `base_model_name_or_path`
            and what differs from PEFT's defaults; all other keys are filled in as PEFT writes them.
        where: What an error calls it, e.g. the folder.

    Raises:
        ValueError: for anything that `decode_adapter` would refuse.
    """
    kind = _check_kind(adapter.peft_config, where)
    if not adapter.peft_config.get("base_model_name_or_path"):
        raise ValueError(f"{where}: peft_config has no 'base_model_name_or_path'; expected the base's hub id or folder")
    config = adapter.peft_config
    if not (config.get("peft_version") and config.get("task_type") == "CAUSAL_LM" and config.get("inference_mode")):
        try:  # one that was read from a file of ours has all this, and does without PEFT
            made = _peft_config_class(kind)(**{**config, "task_type": "CAUSAL_LM", "inference_mode": True})
        except TypeError as error:
            raise ValueError(f"{where}: peft_config has a key that PEFT does not know: {error}") from error
        config = made.to_dict()
    peft_config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    check_adapter(AdapterState(adapter.tensors, peft_config), where)
    tensors = {key: np.ascontiguousarray(tensor) for key, tensor in adapter.tensors.items()}
    return {
        CONFIG_NAME: json.dumps(peft_config, indent=2, sort_keys=True).encode(),
        TENSORS_NAME: save(tensors, metadata={"format": "pt"}),
    }


def load_adapter(folder: Path) -> AdapterState:
    """Reads one adapter folder, made here or by PEFT; returns and raises as `decode_adapter`.

    Pickle files are never opened.
    """
    files = {name: (folder / name).read_bytes() for name in (CONFIG_NAME, TENSORS_NAME) if (folder / name).is_file()}
    if CONFIG_NAME in files and TENSORS_NAME not in files:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
        found = f"only {pickles[0]}, a pickle, which is never opened" if pickles else "no weights"
        raise ValueError(f"{folder}: {found}; expected {TENSORS_NAME}")
    return decode_adapter(files, str(folder))


def decode_adapter(files: Mapping[str, bytes], where: str) -> AdapterState:
    """The adapter in a folder's files, by name, verified as `check_adapter` says.

    Returns:
        AdapterState: tensors in float32 (float16 and bfloat16 files are widened), `peft_config` as it stands on disk.

    Raises:
        ValueError: naming `where` and the file, the key, the value and what is expected.
    """
    for name in (CONFIG_NAME, TENSORS_NAME):
        if name not in files:
            raise ValueError(f"{where}: no {name}; expected a folder with an adapter in PEFT format")
    try:
        peft_config = json.loads(files[CONFIG_NAME].decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}/{CONFIG_NAME}: not JSON: {error}") from error
    if not isinstance(peft_config, dict):
        held = type(peft_config).__name__
        raise ValueError(f"{where}/{CONFIG_NAME}: holds a {held}; expected an object with 'peft_type'")
    try:
        tensors = _read_tensors(files[TENSORS_NAME])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{where}/{TENSORS_NAME}: not a whole safetensors file of floats: {error}") from error
    adapter = AdapterState(tensors, peft_config)
    check_adapter(adapter, where)
    return adapter


def _read_tensors(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as float32, without a copy where they are: the library copies each, for 0.7 ms.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError: It is none, or the tensors do
            not lie end to end and fill it.
    """
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header.pop("__metadata__", None)
    tensors, end = {}, begin
    for key, part in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype = part["dtype"]
        if dtype not in _FLOAT_DTYPES:
            raise ValueError(f"{key!r} is {dtype}; expected one of {', '.join(_FLOAT_DTYPES)}")
        array = np.ndarray(part["shape"], _FLOAT_DTYPES[dtype], data, end)
        if part["data_offsets"] != [end - begin, end - begin + array.nbytes]:
            raise ValueError(
                f"{key!r} lies at {part['data_offsets']}; expected {array.nbytes} bytes from {end - begin}"
            )
        tensors[key], end = array if dtype == "F32" else _float32(array), end + array.nbytes
    if end != len(data):
        raise ValueError(f"it has {len(data)} bytes; expected {end}")
    return tensors


def _float32(array: np.ndarray) -> np.ndarray:
    if array.dtype == _FLOAT_DTYPES["BF16"]:  # float32 without its lower half
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def check_adapter(adapter: AdapterState, where: str) -> None:
    """Verifies an adapter against its own config: kind, options, exact keys, shapes, float32, finite values.

    Without the base it can't know how many layers there must be: whoever puts the adapter on a base compares the keys.

    Args:
        adapter: As loaded, or about to be saved.
        where: What an error calls it, e.g. the folder.

    Raises:
        ValueError: naming `where`, the key, the value and what is expected.
    """
    config, tensors = adapter.peft_config, adapter.tensors
    kind = _check_kind(config, where)
    _check_options(config, kind, where)
    if not tensors:
        raise ValueError(f"{where}: holds no tensors; expected those of a {kind} adapter")
    for key, tensor in tensors.items():
        if tensor.dtype != np.float32:
            raise ValueError(f"{where}: {key!r} is {tensor.dtype}; expected float32")
        if not np.isfinite(tensor).all():
            raise ValueError(f"{where}: {key!r} holds NaN or infinite values; expected finite ones")
    if kind == "PROMPT_TUNING":
        _check_prompt(tensors, config, where)
    else:
        shapes = tuple((key, tensor.shape) for key, tensor in tensors.items())
        names = (config["target_modules"], config.get("feedforward_modules") or ())
        targets, feedforward = (name if isinstance(name, str) else tuple(name) for name in names)
        try:
            _check_modules(shapes, kind, config.get("r", 0), targets, feedforward)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def matches_target(module: str, target_modules: Names) -> bool:
    """Whether PEFT would put an adapter on `module`: a string is a full-match regex, a list holds names or endings."""
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in target_modules)


def _peft_config_class(kind: str) -> Any:
    # Imported here: PEFT brings torch along, which takes seconds, and `oppu doctor` reads this package where either may
    # be missing.
    from peft import IA3Config, LoraConfig, PromptTuningConfig

    return {"LORA": LoraConfig, "IA3": IA3Config, "PROMPT_TUNING": PromptTuningConfig}[kind]


@cache
def _defaults(kind: str) -> dict[str, Any]:
    defaults: dict[str, Any] = _peft_config_class(kind)().to_dict()
    return defaults


def _check_kind(config: Mapping[str, Any], where: str) -> str:
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in _KEYS_OF_KIND:
        raise ValueError(f"{where}: peft_type is {kind!r}; expected one of {', '.join(_KEYS_OF_KIND)}")
    return str(getattr(kind, "value", kind))


def _check_options(config: Mapping[str, Any], kind: str, where: str) -> None:
    """An option we do not know must stand at PEFT's default: any other value would change what the tensors mean."""
    for key in config.keys() - _COMMON_KEYS - _KEYS_OF_KIND[kind]:
        default = _DEFAULTS.get(key)
        if config[key] != default and (config[key] or default):
            default = _defaults(kind).get(key)  # another version of PEFT may have another
            if config[key] != default and (config[key] or default):
                raise ValueError(f"{where}: {key} is {config[key]!r}; expected PEFT's default {default!r}")
    if kind == "PROMPT_TUNING":
        _check_count(config, "num_virtual_tokens", where)
        return
    _check_names(config, "target_modules", where)
    if config.get("feedforward_modules"):
        _check_names(config, "feedforward_modules", where)
    if kind == "LORA":
        _check_count(config, "r", where)
        alpha = config.get("lora_alpha")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e9:
            raise ValueError(f"{where}: lora_alpha is {alpha!r}; expected a number above 0 and below 1e9")
        if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
            raise ValueError(
                f"{where}: init_lora_weights is {config['init_lora_weights']!r}, which changes the base; "
                "expected true, false or 'gaussian'"
            )


def _check_names(config: Mapping[str, Any], key: str, where: str) -> None:
    names = config.get(key)
    try:
        if isinstance(names, str):
            re.compile(names)
            if not _may_hang(names):
                return
        if names and isinstance(names, list | tuple | set) and all(isinstance(name, str) for name in names):
            return
    except re.error:
        pass
    raise ValueError(f"{where}: {key} is {names!r}; expected a list of module names, or a simple regular expression")


def _may_hang(pattern: str) -> bool:
    """Whether matching it could take for ever: a repeated group, or many repeats. Whoever made the file wrote it."""
    return len(pattern) > 1000 or len(re.findall(r"[*+{]", pattern)) > 3 or bool(re.search(r"\)[*+{]", pattern))


def _check_count(config: Mapping[str, Any], key: str, where: str) -> None:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where}: {key} is {value!r}; expected a positive whole number")


def _check_prompt(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], where: str) -> None:
    if set(tensors) != {PROMPT_KEY}:
        raise ValueError(f"{where}: has keys {sorted(tensors)}; expected exactly {PROMPT_KEY!r}")
    shape = tensors[PROMPT_KEY].shape
    wanted = (config["num_virtual_tokens"], config.get("token_dim") or (shape[-1] if shape else 0))
    if shape != wanted or 0 in shape:
        raise ValueError(f"{where}: {PROMPT_KEY!r} has shape {shape}; expected {wanted} (tokens x token_dim)")


@lru_cache(NUM_LAYOUTS)  # 120 names each time a user comes; those of a run's adapters are all the same
def _check_modules(shapes: Shapes, kind: str, rank: int, targets: Names, feedforward: Names) -> None:
    parts_of_kind = {"lora_A.weight", "lora_B.weight"} if kind == "LORA" else {"ia3_l"}
    parts_of_module: dict[str, set[str]] = {}
    for key, shape in shapes:
        match = TENSOR_KEY.fullmatch(key)
        if match is None or match["part"] not in parts_of_kind or not matches_target(match["module"], targets):
            raise ValueError(f"{key!r} is not a key of a {kind} adapter with target_modules {targets!r}")
        wanted = _expected_shape(match["module"], match["part"], shape, rank, feedforward)
        if shape != wanted or 0 in shape:
            raise ValueError(f"{key!r} has shape {shape}; expected {wanted}")
        parts_of_module.setdefault(match["module"], set()).add(match["part"])
    for module, parts in parts_of_module.items():
        if missing := parts_of_kind - parts:
            raise ValueError(f"{module!r} has no {missing.pop()}; expected {sorted(parts_of_kind)}")
    if not isinstance(targets, str):
        for target in targets:
            if not any(matches_target(module, (target,)) for module in parts_of_module):
                raise ValueError(f"no tensors for target module {target!r}; expected at least one layer's")


def _expected_shape(module: str, part: str, shape: tuple[int, ...], rank: int, feedforward: Names) -> tuple[int, ...]:
    """A [r, in], B [out, r]; IA3 scales an attention linear's output, [out, 1], or a feed-forward's input, [1, in]."""
    if part == "lora_A.weight":
        return (rank, shape[-1] if shape else 0)
    if part == "lora_B.weight":
        return (shape[0] if shape else 0, rank)
    if matches_target(module, feedforward):
        return (1, math.prod(shape))
    return (math.prod(shape), 1)
