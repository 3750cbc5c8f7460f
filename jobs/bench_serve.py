"""Serving speed against the alternatives: the same adapters, prompts and lengths, in one run on one machine.

    python -m jobs.bench_serve jobs/configs/demo.yaml --part engine --repeats 3

Systems: `base_only`, `ours_1`, `ours_8`, `ours_32` (32 rows of one engine wearing no, 1, 8 or 32 adapters, in turn),
`peft_mixed` (HF PEFT's `generate` with `adapter_names`), `peft_swap` (`set_adapter` and one row at a time), and 32
clients who each ask again when they are answered: `resident` (as many users as slots), `churn` (ten times as many, read
from disk when they come) and `cold` (nobody comes twice). Prompts are random tokens and no answer ends early.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROWS = 32
CHURN = 10  # users per slot


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", default=Path("jobs/configs/demo.yaml"))
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--part", choices=["engine"], default="engine")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--asks", type=int, default=320, help="questions to each of resident, churn and cold")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("runs/bench/serve.json"))
    parser.add_argument("--run", nargs=2, metavar=("PROCESS", "ADAPTERS"), help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    if options.run:
        print(json.dumps({"ours": run_ours, "peft": run_peft}[options.run[0]](options, Path(options.run[1]))))
        return 0
    return compare(options)


def compare(options: argparse.Namespace) -> int:
    """Write the adapters, run ours and PEFT each in a process of its own, print the table and the ratios."""
    from oppu_ray.files import write_atomic
    from oppu_ray.stages import hardware

    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_adapters(options, Path(folder), CHURN * ROWS)
        for process in ("ours", "peft"):
            command = [sys.executable, "-m", "jobs.bench_serve", *sys.argv[1:], "--run", process, folder]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows |= json.loads(answer.stdout.splitlines()[-1])
    answers = {system: rows[system].pop("answers") for system in ("ours_32", "peft_mixed")}
    result = {
        "command": "bench serve",
        "config": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "hardware": hardware(),
        "rows": rows,
        "ratios": ratios(rows),
        "same_first_token": statistics.fmean(
            one[0] == other[0] for one, other in zip(answers["ours_32"], answers["peft_mixed"], strict=True)
        ),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out, json.dumps(result, indent=1).encode())
    print(table(result))
    return 0


def open_config(options: argparse.Namespace) -> Any:
    from oppu_ray.config import load_config

    return load_config(options.config, options.overrides)


def write_adapters(options: argparse.Namespace, folder: Path, num: int) -> None:
    """`num` different adapters of the config's shape, in PEFT format."""
    import numpy as np

    from oppu_ray.adapter_files import save_adapter
    from oppu_ray.adapters import AdapterBank
    from oppu_ray.base_model import load_base
    from oppu_ray.core import AdapterState

    config = open_config(options)
    bank = AdapterBank(load_base(config.base).model, 1, [config.personal.peft], trainable=True)
    bank.start(0, config.personal.peft, seed=0)
    fresh = bank.export(0)
    for i in range(num):
        draw = np.random.default_rng(i)
        tensors = {
            key: (value + draw.normal(0, 0.01, value.shape)).astype(np.float32) for key, value in fresh.tensors.items()
        }
        peft_config = {**fresh.peft_config, "base_model_name_or_path": config.base.name}
        save_adapter(folder / f"u{i}", AdapterState(tensors, peft_config))


def prompts(options: argparse.Namespace, vocab_size: int, seed: int = 0) -> Iterator[tuple[int, ...]]:
    """Endless random prompts."""
    draw = random.Random(seed)
    while True:
        yield tuple(draw.randrange(vocab_size) for _ in range(options.prompt_tokens))


def run_ours(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Speeds of one engine with no, 1, 8 and 32 adapters in turn; then the clients."""
    import torch

    from oppu_ray.adapter_files import load_adapter
    from oppu_ray.inference import Engine
    from oppu_ray.workers import open_base

    torch.set_num_threads(options.threads)
    config = open_config(options)
    engine = Engine(open_base(config).model, ROWS, [config.personal.peft], max_rows=ROWS, max_tokens_per_pass=512)
    engine.warm_up()
    for i in range(ROWS):
        engine.load(f"u{i}", load_adapter(folder / f"u{i}"))
    systems = {"base_only": 0, "ours_1": 1, "ours_8": 8, "ours_32": ROWS}
    runs: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
    for repeat in range(options.repeats + 1):
        for system, num_adapters in systems.items():
            made = answer_rows(engine, options, num_adapters)
            if repeat:  # the first round is for the machine to get warm
                runs[system].append(made)
    rows = {
        system: {key: statistics.median(run[key] for run in made) for key in ("tokens_per_s", "decode_tokens_per_s")}
        for system, made in runs.items()
    }
    rows["ours_32"]["answers"] = runs["ours_32"][0]["answers"]
    shares = [
        ours["decode_tokens_per_s"] / base["decode_tokens_per_s"]
        for ours, base in zip(runs["ours_32"], runs["base_only"], strict=True)
    ]
    rows["ours_32"]["share_of_base_only"] = statistics.median(shares)
    engine.unload_all()
    draw = random.Random(0)
    users = {
        "resident": [draw.randrange(ROWS) for _ in range(options.asks)],
        "churn": [draw.randrange(CHURN * ROWS) for _ in range(options.asks)],
        "cold": [i % (CHURN * ROWS) for i in range(ROWS, ROWS + options.asks)],
    }
    ask_all(engine, options, folder, list(range(ROWS)))  # makes them resident
    return rows | {name: ask_all(engine, options, folder, who) for name, who in users.items()}


def answer_rows(engine: Any, options: argparse.Namespace, num_adapters: int) -> dict[str, Any]:
    """32 answers; the decoding rate is that of the steps in which all rows were decoded and none read."""
    from oppu_ray.core import Request

    answers: dict[str, list[int]] = {str(i): [] for i in range(ROWS)}
    for i, prompt in enumerate(itertools.islice(prompts(options, engine.model.config.vocab_size), ROWS)):
        adapter_id = f"u{i % num_adapters}" if num_adapters else None
        engine.submit(Request(str(i), prompt, adapter_id, options.new_tokens))
    began, decoding = time.perf_counter(), []
    while engine.has_work:
        started = time.perf_counter()
        events = engine.step()
        if len(events) == ROWS and all(answers.values()):
            decoding.append(time.perf_counter() - started)
        for event in events:
            answers[event.request_id] += event.token_ids
    elapsed = time.perf_counter() - began
    return {
        "tokens_per_s": sum(map(len, answers.values())) / elapsed,
        "decode_tokens_per_s": ROWS / statistics.median(decoding),
        "answers": list(answers.values()),
    }


def ask_all(engine: Any, options: argparse.Namespace, folder: Path, users: list[int]) -> dict[str, Any]:
    """32 clients; whose adapter is in no slot waits while a thread reads and checks it."""
    from oppu_ray.adapter_files import load_adapter
    from oppu_ray.core import Request

    waiting, made = enumerate(users), prompts(options, engine.model.config.vocab_size, seed=1)
    asked: dict[str, float] = {}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    read: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with ThreadPoolExecutor(1) as reader:

        def fetch(request: Any) -> None:
            read.put((request, engine.fit(load_adapter(folder / request.adapter_id))))

        def ask() -> None:
            for i, user in itertools.islice(waiting, 1):
                request = Request(str(i), next(made), f"u{user}", options.new_tokens // 4, user_id=f"u{user}")
                asked[str(i)] = time.perf_counter()
                if engine.is_loaded(request):
                    engine.submit(request)
                else:
                    reader.submit(fetch, request)

        for _ in range(ROWS):
            ask()
        num_loads, began = 0, time.perf_counter()
        while len(last) < len(users):
            while not read.empty() or not engine.has_work:
                engine.submit(*read.get(timeout=60))
                num_loads += 1
            for event in engine.step():
                first.setdefault(event.request_id, time.perf_counter() - asked[event.request_id])
                if event.finish_reason:
                    last[event.request_id] = time.perf_counter() - asked[event.request_id]
                    ask()
    return {
        "answers_per_s": len(users) / (time.perf_counter() - began),
        "num_loads": num_loads,
        **percentiles("first_token", list(first.values())),
        **percentiles("answer", list(last.values())),
    }


def percentiles(name: str, seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"{name}_p{p}_s": cuts[p - 1] for p in (50, 95, 99)}


def run_peft(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """HF PEFT's own generation, all adapters registered in one model."""
    import torch
    from peft import PeftModel

    from oppu_ray.base_model import load_base
    from oppu_ray.kernels import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(options.threads)
    model = load_base(open_config(options).base).model
    wrapped = PeftModel.from_pretrained(model, str(folder / "u0"), adapter_name="u0")
    for i in range(1, ROWS):
        wrapped.load_adapter(str(folder / f"u{i}"), adapter_name=f"u{i}")
    wrapped.eval()
    made = prompts(options, model.config.vocab_size)
    ids = torch.tensor([next(made) for _ in range(ROWS)])

    def generate(rows: Any, num_new: int, **extra: Any) -> tuple[float, Any]:
        started = time.perf_counter()
        with torch.inference_mode():
            answers = wrapped.generate(
                input_ids=rows,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=num_new,
                min_new_tokens=num_new,
                do_sample=False,
                **extra,
            )
        return time.perf_counter() - started, answers[:, rows.shape[1] :]

    names = {"adapter_names": [f"u{i}" for i in range(ROWS)]}
    generate(ids, 2, **names)
    mixed, swapped, answers = [], [], ids
    for _ in range(options.repeats):
        first, _ = generate(ids, 1, **names)
        whole, answers = generate(ids, options.new_tokens, **names)
        mixed.append((whole, first))
        started = time.perf_counter()
        for i in range(4):
            wrapped.set_adapter(f"u{i}")
            generate(ids[i : i + 1], options.new_tokens)
        swapped.append(4 * options.new_tokens / (time.perf_counter() - started))
    return {
        "peft_mixed": {
            "tokens_per_s": statistics.median(ROWS * options.new_tokens / whole for whole, _ in mixed),
            "decode_tokens_per_s": statistics.median(
                ROWS * (options.new_tokens - 1) / (whole - first) for whole, first in mixed
            ),
            "answers": answers.tolist(),
        },
        "peft_swap": {"tokens_per_s": statistics.median(swapped)},
    }


def ratios(rows: dict[str, Any]) -> dict[str, float]:
    """`cold_added_p99_s` is what a cold adapter adds to the 99th percentile of the time to the first token."""
    return {
        "mixed32_vs_base_only": rows["ours_32"]["share_of_base_only"],
        "ours_vs_peft_mixed": rows["ours_32"]["tokens_per_s"] / rows["peft_mixed"]["tokens_per_s"],
        "ours_vs_peft_mixed_decode": rows["ours_32"]["decode_tokens_per_s"] / rows["peft_mixed"]["decode_tokens_per_s"],
        "ours_vs_peft_swap": rows["ours_32"]["tokens_per_s"] / rows["peft_swap"]["tokens_per_s"],
        "churn_vs_resident_p95": rows["churn"]["answer_p95_s"] / rows["resident"]["answer_p95_s"],
        "cold_added_p99_s": rows["cold"]["first_token_p99_s"] - rows["resident"]["first_token_p99_s"],
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{'system':<12}{'tokens/s':>10}{'decoding':>10}"]
    clients = [f"{'32 clients':<12}{'answers/s':>10}{'loads':>7}{'first p50':>11}{'p99':>8}{'whole p50':>11}{'p95':>8}"]
    for system, row in result["rows"].items():
        if "tokens_per_s" in row:
            decoding = f"{row['decode_tokens_per_s']:>10.0f}" if "decode_tokens_per_s" in row else ""
            lines.append(f"{system:<12}{row['tokens_per_s']:>10.0f}{decoding}")
        else:
            clients.append(
                f"{system:<12}{row['answers_per_s']:>10.1f}{row['num_loads']:>7}"
                f"{row['first_token_p50_s']:>9.3f} s{row['first_token_p99_s']:>6.3f} s"
                f"{row['answer_p50_s']:>9.3f} s{row['answer_p95_s']:>6.3f} s"
            )
    found = [f"{name}: {value:.3f}" for name, value in result["ratios"].items()]
    same = f"first tokens equal to PEFT's: {result['same_first_token']:.0%}"
    return "\n".join([*lines, "", *clients, "", *found, same])


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
