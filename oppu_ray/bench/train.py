"""Training speed against the alternatives, on the same users, steps and starting weights, each in its own process.

    oppu bench train movie_tagging data.path=users.jsonl.gz --users 32 --steps 2 --repeats 3

Systems: `peft_sequential` (HF PEFT user by user, as the paper's loop; `bookkeeping_s` apart), `peft_mixed` (one PEFT
model with all adapters, `adapter_names` per row, eval mode), both also with our allocator's settings, which no user of
PEFT has (`..._tuned`), `mlora` and `skyrl_tx` (`peers/`, on CPU, where an interpreter that has them is given),
`ours_unshared` (no prefix sharing), `ours`, and `ours_one_user` (for memory). The floor is 4 P FLOP per useful token, P
the parameters in matrix products, at the best matrix product that this machine reaches in the same run. Useful tokens
count what a user's step shares once; their share is of all tokens that a system gave to the model, padding included.
All systems compute in the type that ours would (`machine.compute_dtype`).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from oppu_ray.bench import peer_environment
from oppu_ray.configs import find_config

PEERS = {"mlora": "peers.mlora", "skyrl_tx": "peers.tx"}
INSTALL = {
    "mlora": """mlora left out: give --mlora-python PATH or OPPU_MLORA_PYTHON, an interpreter made by
    python3.12 -m venv mlora && mlora/bin/pip install torch==2.13.0 'transformers>=5.19,<6' tensorboard safetensors
    mlora/bin/pip install --no-deps git+https://github.com/TUDB-Labs/mLoRA""",
    "skyrl_tx": """skyrl_tx left out: give --tx-python PATH or OPPU_TX_PYTHON, an interpreter made by
    python3.11 -m venv tx && tx/bin/pip install torch==2.13.0 && tx/bin/pip install --no-deps skyrl-tx==0.3.0
    tx/bin/pip install jax flax optax peft cloudpathlib rich pydantic 'transformers>=4.56.1,<5'""",
}
TUNED = "_tuned"
RIVALS = ("peft_sequential", "peft_mixed", "peft_sequential_tuned", "peft_mixed_tuned", *PEERS)
SYSTEMS = (*RIVALS, "ours_unshared", "ours", "ours_one_user")
MIXED_BYTES = 64  # rows of a mixed batch times bytes of a number: 32 rows in 16 bits took 24 GB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=find_config, nargs="?", default="demo", help="YAML file, or a name")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mlora-python", default=os.environ.get("OPPU_MLORA_PYTHON"), help="interpreter with mLoRA")
    parser.add_argument("--tx-python", default=os.environ.get("OPPU_TX_PYTHON"), help="interpreter with SkyRL-tx")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/train.json"))
    parser.add_argument("--run", nargs=2, metavar=("SYSTEM", "WORK"), help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    if options.run:
        print(json.dumps(run_system(options.run[0], json.loads(Path(options.run[1]).read_text()))))
        return 0
    return compare(options)


def compare(options: argparse.Namespace) -> int:
    """Make the work file, run every system in turn `repeats` times, print medians and ratios."""
    from oppu_ray.config import load_config
    from oppu_ray.files import write_atomic
    from oppu_ray.machine import compute_dtype, hardware

    config = load_config(options.config, [*options.overrides, f"base.device={options.device}"])
    dtype = compute_dtype(config.base.dtype, options.device)
    config = replace(config, base=replace(config.base, dtype=dtype))  # type: ignore[arg-type]
    on_cpu = options.device == "cpu"
    interpreters = {"mlora": options.mlora_python, "skyrl_tx": options.tx_python}
    missing = [system for system in options.systems if system in PEERS and not (interpreters[system] and on_cpu)]
    runs: dict[str, list[dict[str, Any]]] = {system: [] for system in options.systems if system not in missing}
    with tempfile.TemporaryDirectory() as folder:
        work_path = Path(folder) / "work.json"
        work = make_work(config, options.users, options.steps, Path(folder))
        work_path.write_text(json.dumps(work))
        for repeat in range(options.repeats):
            for system in runs:
                if system in PEERS:
                    run = [interpreters[system], "-m", PEERS[system], str(work_path)]
                    runs[system].append(run_process(run, peer_environment()))
                else:
                    ours = [sys.executable, "-m", "oppu_ray.bench.train", str(options.config)]
                    runs[system].append(run_process([*ours, "--run", system, str(work_path)]))
                print(f"{repeat + 1}/{options.repeats} {system}: {runs[system][-1]['elapsed_s']:.1f} s", flush=True)
    flops = best_product(options.device, config.base.dtype)
    rows = {system: summarise_runs(results, work["users"]) for system, results in runs.items()}
    floor = flops / (4 * work["num_matrix_parameters"])
    for row in rows.values():
        row["floor_share"] = row["useful_tokens_per_s"] / floor
    result = {
        "command": "bench train",
        "config": {
            "file": str(options.config),
            "users": options.users,
            "steps": options.steps,
            "dtype": config.base.dtype,
        },
        "hardware": hardware(),
        "best_product_flops": flops,
        "floor_tokens_per_s": floor,
        "rows": rows,
        "ratios": ratios(rows),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out, json.dumps(result, indent=1).encode())
    print(table(result))
    for system in missing:
        print(INSTALL[system])
    return 0


def run_process(command: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """What the command prints last, as JSON.

    Raises:
        RuntimeError: It failed; with the end of its own error text.
    """
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    if answer.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {answer.returncode}:\n{answer.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return result


def make_work(config: Any, num_users: int, num_steps: int, folder: Path) -> dict[str, Any]:
    """The most active targets' first steps, tokenised, and what each system needs to train them.

    Starting weights go to `folder` as safetensors, for the systems that cannot make ours from a seed.
    """
    import torch
    from safetensors.numpy import save_file

    from oppu_ray.base_model import load_base, prepare_base
    from oppu_ray.config import to_dict
    from oppu_ray.history import load_histories
    from oppu_ray.packing import make_rows, plan_user
    from oppu_ray.randomness import user_seed
    from oppu_ray.training import learning_rate
    from oppu_ray.workers import encode_user

    users, _ = load_histories(config.data, config.task, config.seed)
    chosen = sorted((u for u in users if u.role == "target"), key=lambda u: (-len(u.items), u.user_id))[:num_users]
    base = load_base(config.base)
    works: list[dict[str, Any]] = []
    for user in chosen:
        seed = user_seed(config.seed, user.user_id)
        planned = plan_user(user.user_id, seed, encode_user(config, user, base), config.personal)
        steps = planned.steps[:num_steps]
        start = folder / f"start-{len(works)}.safetensors"
        save_file(starting_adapter(base.model, planned).tensors, start)
        works.append(
            {
                "user_id": user.user_id,
                "seed": seed,
                "steps": [[[list(e.input_ids), e.num_prompt] for e in step] for step in steps],
                "rates": [learning_rate(config.personal, step, len(steps)) for step in range(len(steps))],
                "start": str(start),
                "num_useful_tokens": sum(row.num_tokens for step in steps for row in make_rows(0, step, 10**9)),
            }
        )
    linears = [module for module in base.model.modules() if isinstance(module, torch.nn.Linear)]
    return {
        "config": to_dict(config),
        "base": str(prepare_base(config.base)),
        "users": works,
        "num_matrix_parameters": sum(linear.weight.numel() for linear in linears),
    }


def run_system(system: str, work: dict[str, Any]) -> dict[str, Any]:
    """One system in this process: seconds of training alone, last losses, peak bytes, tokens given to the model."""
    import torch

    from oppu_ray.base_model import load_base
    from oppu_ray.config import from_dict
    from oppu_ray.core import Example, UserWork
    from oppu_ray.kernels import keep_freed_memory
    from oppu_ray.workers import open_base

    if system.startswith("ours") or system.endswith(TUNED):
        keep_freed_memory()
    config = from_dict(work["config"])
    users = [
        UserWork(
            user["user_id"],
            user["seed"],
            config.personal.peft,
            tuple(tuple(Example(tuple(ids), num) for ids, num in step) for step in user["steps"]),
        )
        for user in work["users"][: 1 if system == "ours_one_user" else None]
    ]
    path = Path(work["base"])
    base = open_base(config, path) if system.startswith("ours") else load_base(config.base, path)
    train = {"peft_sequential": peft_sequential, "peft_mixed": peft_mixed}.get(system.removesuffix(TUNED), ours)
    warm = [UserWork(u.user_id, u.seed, u.peft, (u.steps[0][:4],)) for u in users[:2]]
    train(system, base.model, warm, config.personal)  # compiles, and touches every weight once
    computed: list[int] = []
    base.model.get_input_embeddings().register_forward_hook(lambda _, ids, __: computed.append(ids[0].numel()))
    started = time.perf_counter()
    losses, bookkeeping_s = train(system, base.model, users, config.personal)
    elapsed = time.perf_counter() - started
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if config.base.device != "cpu":
        peak = torch.cuda.max_memory_allocated()
    measured = {"elapsed_s": elapsed, "bookkeeping_s": bookkeeping_s, "losses": losses, "peak_bytes": peak}
    return {**measured, "num_computed_tokens": sum(computed)}


def ours(system: str, model: Any, users: Sequence[Any], config: Any) -> tuple[dict[str, float], float]:
    from oppu_ray.training import train_pack

    results = train_pack(model, users, replace(config, share_prefix=system != "ours_unshared"))
    return {result.user_id: result.losses[-1] for result in results}, 0.0


def peft_sequential(system: str, model: Any, users: Sequence[Any], config: Any) -> tuple[dict[str, float], float]:
    """The paper's loop: attach a fresh adapter, train, detach; attaching is counted as bookkeeping."""
    losses, bookkeeping_s = {}, 0.0
    for user in users:
        started = time.perf_counter()
        wrapped = attach(model, [user])
        bookkeeping_s += time.perf_counter() - started
        optimizers = {user.user_id: optimizer(wrapped, config)}
        for step, examples in enumerate(user.steps):
            loss = row_losses(wrapped, examples).sum() / sum(e.num_completion for e in examples)
            loss.backward()
            update(optimizers[user.user_id], config, step, len(user.steps))
            losses[user.user_id] = loss.item()
        started = time.perf_counter()
        wrapped.unload()
        bookkeeping_s += time.perf_counter() - started
    return losses, bookkeeping_s


def peft_mixed(system: str, model: Any, users: Sequence[Any], config: Any) -> tuple[dict[str, float], float]:
    """All adapters in one PEFT model; batches of 32 rows (16 in float32) of similar length name their adapters."""
    num_rows = MIXED_BYTES // model.dtype.itemsize
    started = time.perf_counter()
    wrapped = attach(model, users)
    wrapped.eval()
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_("lora_" in name)
    optimizers = {u.user_id: optimizer(wrapped, config, f"u{i}") for i, u in enumerate(users)}
    bookkeeping_s = time.perf_counter() - started
    losses: dict[str, float] = {}
    for step in range(max(len(user.steps) for user in users)):
        rows = [(i, e) for i, user in enumerate(users) if step < len(user.steps) for e in user.steps[step]]
        totals = {i: sum(e.num_completion for e in users[i].steps[step]) for i, _ in rows}
        sums = dict.fromkeys(totals, 0.0)
        rows.sort(key=lambda row: len(row[1].input_ids))
        for start in range(0, len(rows), num_rows):
            part = rows[start : start + num_rows]
            values = row_losses(wrapped, [e for _, e in part], [f"u{i}" for i, _ in part])
            sum(value / totals[i] for (i, _), value in zip(part, values, strict=True)).backward()  # type: ignore[union-attr]
            for (i, _), value in zip(part, values.tolist(), strict=True):
                sums[i] += value / totals[i]
        for i in totals:
            update(optimizers[users[i].user_id], config, step, len(users[i].steps))
            losses[users[i].user_id] = sums[i]
    started = time.perf_counter()
    wrapped.unload()
    return losses, bookkeeping_s + time.perf_counter() - started


def starting_adapter(model: Any, user: Any) -> Any:
    """The weights with which our bank starts this user, in PEFT's keys."""
    from oppu_ray.adapters import AdapterBank

    bank = AdapterBank(model, 1, [user.peft], trainable=True)
    bank.start(0, user.peft, user.seed)
    state = bank.export(0)
    bank.remove()
    return state


def attach(model: Any, users: Sequence[Any]) -> Any:
    """PEFT adapters with the very starting weights that our bank gives these users."""
    import torch
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    from oppu_ray.adapters import peft_dict

    states = [starting_adapter(model, user) for user in users]
    shape = {key: value for key, value in peft_dict(users[0].peft).items() if key != "peft_type"}
    wrapped = get_peft_model(model, LoraConfig(**shape, task_type="CAUSAL_LM"), adapter_name="u0")
    for i in range(1, len(users)):
        wrapped.add_adapter(f"u{i}", LoraConfig(**shape, task_type="CAUSAL_LM"))
    for i, state in enumerate(states):
        tensors = {key: torch.from_numpy(value) for key, value in state.tensors.items()}
        set_peft_model_state_dict(wrapped, tensors, adapter_name=f"u{i}")
    return wrapped


def optimizer(wrapped: Any, config: Any, adapter: str = "u0") -> Any:
    import torch

    mine = [p for name, p in wrapped.named_parameters() if "lora_" in name and f".{adapter}." in name]
    return torch.optim.AdamW(mine, lr=config.learning_rate, weight_decay=config.weight_decay)


def update(adam: Any, config: Any, step: int, num_steps: int) -> None:
    import torch

    from oppu_ray.training import learning_rate

    for group in adam.param_groups:
        group["lr"] = learning_rate(config, step, num_steps)
        torch.nn.utils.clip_grad_norm_(group["params"], config.clip_norm)
    adam.step()
    adam.zero_grad()


def row_losses(wrapped: Any, examples: Sequence[Any], names: list[str] | None = None) -> Any:
    """Summed completion losses per row of one padded batch, as a Hugging Face loop computes them."""
    import torch

    longest = max(len(e.input_ids) for e in examples)
    device = wrapped.device
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, e in enumerate(examples):
        ids[row, : len(e.input_ids)] = torch.tensor(e.input_ids)
        labels[row, e.num_prompt : len(e.input_ids)] = torch.tensor(e.input_ids[e.num_prompt :])
    mask = torch.tensor([[i < len(e.input_ids) for i in range(longest)] for e in examples])
    extra = {"adapter_names": names} if names else {}
    logits = wrapped(input_ids=ids.to(device), attention_mask=mask.long().to(device), use_cache=False, **extra).logits
    flat = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten().to(device), reduction="none"
    )
    return flat.view(len(examples), -1).sum(1)


def best_product(device: str, dtype: str) -> float:
    """Best FLOP/s over a few matrix products, each the median of 20."""
    import torch

    from oppu_ray.kernels import keep_freed_memory

    keep_freed_memory()
    best = 0.0
    for rows, width, out in ((2048, 576, 576), (4096, 576, 1536), (4096, 1536, 576), (4096, 2048, 2048)):
        x, w = (torch.randn(*s, device=device, dtype=getattr(torch, dtype)) for s in ((rows, width), (out, width)))
        seconds = _median_seconds(functools.partial(torch.nn.functional.linear, x, w))
        best = max(best, 2 * rows * width * out / seconds)
    return best


def _median_seconds(function: Callable[[], Any]) -> float:
    import torch

    seconds = []
    for _ in range(23):
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[3:])


def summarise_runs(results: list[dict[str, Any]], users: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A system's row: medians of its runs over those of the work file's `users` that it trained."""
    elapsed = statistics.median(result["elapsed_s"] for result in results)
    bookkeeping = statistics.median(result["bookkeeping_s"] for result in results)
    losses = results[0]["losses"]
    trained = [user for user in users if user["user_id"] in losses]
    tokens = sum(user["num_useful_tokens"] for user in trained)
    return {
        "elapsed_s": elapsed,
        "bookkeeping_s": bookkeeping,
        "users_per_hour": 3600 * len(trained) / elapsed,
        "users_per_hour_no_bookkeeping": 3600 * len(trained) / (elapsed - bookkeeping),
        "useful_tokens_per_s": tokens / elapsed,
        "useful_share": tokens / computed if (computed := results[0].get("num_computed_tokens")) else None,
        "tokens_per_user_step": tokens / sum(len(user["steps"]) for user in trained),
        "peak_bytes": max(result["peak_bytes"] for result in results),
        "last_loss": statistics.fmean(losses.values()),
        "losses": losses,
        "note": results[0].get("note", ""),
    }


def ratios(rows: dict[str, Any]) -> dict[str, float]:
    """Ours over each other system, without the other's bookkeeping; nothing where our own row is missing."""
    if "ours" not in rows:
        return {}
    mine, found = rows["ours"], {}
    for system in (*RIVALS, "ours_unshared"):
        if system in rows:
            found[f"ours_vs_{system}"] = mine["users_per_hour"] / rows[system]["users_per_hour_no_bookkeeping"]
            found[f"loss_difference_{system}"] = max(
                abs(mine["losses"][user] - loss) for user, loss in rows[system]["losses"].items()
            )
    if "ours_one_user" in rows:
        found["memory_vs_one_user"] = mine["peak_bytes"] / rows["ours_one_user"]["peak_bytes"]
    found["floor_share"] = mine["floor_share"]
    return found


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{'system':<22}{'users/hour':>11}{'tokens/s':>10}{'useful':>8}{'of floor':>10}{'peak GB':>9}{'last loss':>11}"
    ]
    for system, row in result["rows"].items():
        useful = f"{share:.0%}" if (share := row["useful_share"]) else "-"
        lines.append(
            f"{system:<22}{row['users_per_hour']:>11.0f}{row['useful_tokens_per_s']:>10.0f}{useful:>8}"
            f"{row['floor_share']:>10.0%}{row['peak_bytes'] / 1e9:>9.2f}{row['last_loss']:>11.4f}"
        )
    tokens = next(iter(result["rows"].values()))["tokens_per_user_step"]
    lines += [f"{system}: {row['note']}" for system, row in result["rows"].items() if row["note"]]
    lines.append(f"{tokens:.0f} useful tokens per user-step; floor {result['floor_tokens_per_s']:.0f} tokens/s")
    return "\n".join([*lines, *(f"{name}: {value:.2f}" for name, value in result["ratios"].items())])


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
