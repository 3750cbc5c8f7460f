"""The stages of a run, each a function of the config and of the files the stage before left in `run_dir`.

prepare -> histories checked and indexed; adapt -> task base; train -> one adapter per user in the vault;
evaluate -> predictions and the table. `oppu` and the files in `jobs/` call these and nothing else. Each stage writes
`<run_dir>/<stage>/result.json` and may be run again at any time: what is done is not done again.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import hmac
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from oppu_ray.adapter_files import TENSORS_NAME
from oppu_ray.adapters import targets
from oppu_ray.base_model import Base, linear_names, load_base, merge_adapter, prepare_base
from oppu_ray.checkpoints import remove_checkpoints
from oppu_ray.config import Config, MemoryConfig, to_dict
from oppu_ray.core import Pack, Prediction, TrainResult, UserHistory
from oppu_ray.evaluation import Arm, answer_by_habit, format_table, parse_arm, summarise
from oppu_ray.federated import drop_states, format_summary, summarise_rounds, train_rounds
from oppu_ray.files import write_atomic
from oppu_ray.forget import without_forgotten
from oppu_ray.history import load_histories, write_rejected
from oppu_ray.machine import hardware
from oppu_ray.packing import PackForecast, num_steps, plan_packs, plan_shards
from oppu_ray.pairs import check_strategy
from oppu_ray.prepared import Index, read_index, read_users, write_prepared
from oppu_ray.privacy import epsilon_of
from oppu_ray.progress import Progress, only_driver, progress_bar, stop_on_sigterm
from oppu_ray.tasks import get_task
from oppu_ray.training import train_pack
from oppu_ray.vault import open_vault
from oppu_ray.workers import TASK_ADAPTER, open_base, run_units, task_work


def prepare(config: Config) -> dict[str, Any]:
    """Read, check and index the histories; bad users go to `rejected.jsonl`."""
    _check_task(config)
    folder = _folder(config, "prepare")
    with _result(config, "prepare") as result:
        users, rejected = load_histories(config.data, config.task, config.seed)
        _check_users(config, users)
        with closing(open_vault(config)) as vault, vault.alone():
            keep = without_forgotten(vault)
            index = write_prepared(folder, users, keep)
            rejected = [one for one in rejected if not one.user_id or keep(UserHistory(one.user_id, "", ()))]
            write_rejected(folder / "rejected.jsonl", rejected)
        result["fingerprints"]["histories"] = index.fingerprint
        for role in ("target", "base"):
            sizes = index.sizes(role)
            result[f"num_{role}_users"] = len(sizes)
            result[f"num_{role}_items"] = sum(size.num_items for size in sizes)
        result["num_queries"] = sum(size.num_queries for size in index.sizes("target"))
        result["num_rejected"] = len(rejected)
        print(
            f"{result['num_target_users']} target users ({result['num_target_items']} items to learn from, "
            f"{result['num_queries']} later ones to answer), {result['num_base_users']} base users "
            f"({result['num_base_items']} items), {len(rejected)} rejected"
            + (f" (see {folder / 'rejected.jsonl'})" if rejected else "")
        )
    return result


def adapt(config: Config) -> dict[str, Any]:
    """Train one LoRA on all base users' items and merge it into the base: what all personal adapters stand on.

    So once for every kind of prompt that the arms need; the result of the plain one is returned.
    """
    _check_task(config)
    index = read_index(_folder(config, "prepare"))
    _check_base(config)
    base = open_base(config)
    return [_adapt(one, index, base) for one in _kinds(config, _arms(config))][0]


def _adapt(config: Config, index: Index, base: Base) -> dict[str, Any]:
    folder = _own_folder(config, "adapt")
    with _result(config, "adapt") as result:
        task_id = _digest(
            index.base_fingerprint,
            base.fingerprint,
            to_dict(config)["adapt"],
            to_dict(config)["task"],
            config.seed,
            *config.memory.recipe.items(),
            *([to_dict(config)["federated"]] if config.federated.num_shards else []),
        )
        target, rounds = folder / f"base-{task_id}", folder / f"rounds-{task_id}"
        result["fingerprints"] |= {"base": base.fingerprint, "histories": index.fingerprint}
        result["task_base"] = str(base.path if not index.sizes("base") else target)
        if not index.sizes("base"):
            print("no base users: personal adapters stand on the base model itself")
            result["fingerprints"]["task_base"] = base.fingerprint
            result["was_done"] = True
            return result
        with only_driver(_folder(config, "") / f".adapt-{task_id}.lock", lambda: False):
            result["was_done"] = target.exists()
            result |= _make_task_base(config, index, base, target, rounds)
        result["fingerprints"]["task_base"] = load_base(config.base, target).fingerprint
    return result


def _make_task_base(config: Config, index: Index, base: Base, target: Path, rounds: Path) -> dict[str, Any]:
    """Train the task adapter and merge it into `target`, where that is not done; what the result says of it."""
    if config.federated.num_shards:
        if not target.exists():
            with progress_bar(
                "federated rounds", config.federated.num_rounds, "round", _folder(config, ""), "adapt"
            ) as progress:
                adapter, residual = train_rounds(config, index, base, rounds, progress)
            merge_adapter(base, adapter, target, residual)
        drop_states(rounds)
        summary = summarise_rounds(config, index, rounds)
        print(format_summary(summary))
        return {"federated": summary}
    if target.exists():
        return {}
    trained = _train_task_adapter(config, index, base)
    if trained.adapter is None:
        raise ValueError(f"the task adapter did not train: {trained.error}; lower adapt.learning_rate")
    merge_adapter(base, trained.adapter, target)
    return {"losses": trained.losses, "num_tokens": trained.num_useful_tokens}


def _train_task_adapter(config: Config, index: Index, base: Base) -> TrainResult:
    total = num_steps(sum(size.num_items for size in index.sizes("base")), config.adapt)
    label = f"{TASK_ADAPTER} {config.memory.name}".rstrip()
    with progress_bar(label, total, "step", _folder(config, ""), "adapt") as progress:
        if config.base.deepspeed:
            from oppu_ray import group  # and Ray with it

            return group.adapt(config, progress)
        work = task_work(config, base)
        (trained,) = train_pack(base.model, [work], config.adapt, lambda tokens, _: progress.advance(1, tokens))
    return trained


def train(config: Config) -> dict[str, Any]:
    """Train one adapter per target user on that user's past alone, and commit each to the vault as it is done.

    So once for every kind of prompt in which an arm answers by the user's own adapter. The result is the plain one's,
    but for `num_to_retry`, which counts all.

    Raises:
        Interrupted: The process got SIGTERM. What is done is kept, and the stage goes on from there when run again.
        ValueError: An earlier stage has not run.
    """
    results = [_train(one) for one in _kinds(config, _own_arms(config))]
    return {**results[0], "num_to_retry": sum(result["num_to_retry"] for result in results)}


def _train(config: Config) -> dict[str, Any]:
    index, task_base, run_id = _plan(config)
    shards, is_private = _shards(config, index), config.privacy.noise_multiplier > 0
    num_users, num_packs = len(index.sizes("target")), sum(map(len, shards))
    failed, num_trained, num_split, num_to_retry, num_tokens = {}, 0, 0, 0, 0
    with _result(config, "train") as result:
        result["fingerprints"] |= {"run": run_id} if is_private else {"histories": index.fingerprint, "run": run_id}
        open_vault(config).close()
        label = f"personal adapters {config.memory.name}".rstrip()
        sizes = index.sizes("target")
        if is_private:  # a share of all words would tell how long the texts are
            sizes = [dataclasses.replace(size, num_words=size.num_items) for size in sizes]
        forecast = PackForecast(shards, sizes, config.personal)
        with (
            stop_on_sigterm() as should_stop,
            only_driver(_folder(config, "") / f".train-{run_id}.lock", should_stop),
            progress_bar(label, num_users, "user", _folder(config, ""), "train", num_packs, forecast) as progress,
        ):
            started = time.monotonic()
            units = [[(pack.user_ids,) for pack in shard] for shard in shards]
            for done in run_units(config, task_base, run_id, "train", units, progress, should_stop):
                num_tokens += done.num_tokens
                num_split += done.num_splits > 0
                if done.error:
                    failed[done.user_id] = done.error
                    num_to_retry += done.is_retryable
                else:
                    num_trained += done.version is not None  # None: this run had committed the user before
                # The ranks of a shared-out base report users only, all other workers every step.
                tokens = done.num_tokens if config.base.sharding == "zero3" else 0
                forecast.user_done(done.user_id, is_new=tokens > 0)
                progress.advance(0 if done.error else 1, tokens, failed=1 if done.error else 0)
        elapsed, num_done = time.monotonic() - started, progress.num_done
        remove_checkpoints(_folder(config, ""), run_id)
        result |= {
            "num_done": num_done,
            "num_trained": num_trained,
            "was_done": not num_trained,
            "num_failed": len(failed),
            "num_to_retry": num_to_retry,
            "failed": failed,
            "num_packs": num_packs,
            "num_split_users": num_split,
            "num_recoveries": progress.num_recoveries,
            "recovery_s": progress.recovery_s,
            # Without noise, words say something of the items; losses and tokens are 0 then (see `privacy`).
            "shard_words": [] if is_private else [sum(pack.num_words for pack in shard) for shard in shards],
            "num_tokens": num_tokens,
            "useful_tokens_per_s": num_tokens / elapsed,
            "users_per_hour": 3600 * num_trained / elapsed,
            "adapter_bytes": _adapter_bytes(config, run_id, index),
        }
        if is_private:
            result["privacy"] = _personal_privacy(config, index)
            print(
                "epsilon {epsilon:.2f} at delta {delta:g} at most, for any one item, over all versions of its user "
                "that were trained under noise".format(**result["privacy"])
            )
        before = f" ({num_done - num_trained} of them before)" if num_done > num_trained else ""
        again = f" ({num_to_retry} may succeed when run again)" if num_to_retry else ""
        print(
            f"{num_done} users trained and committed{before}, {len(failed)} failed{again}"
            + ("" if is_private else f", {num_tokens / elapsed:.0f} tokens/s")
        )
    return result


def _personal_privacy(config: Config, index: Index) -> dict[str, Any]:
    """What the versions released so far have cost the target who has paid most."""
    with closing(open_vault(config)) as vault:
        rho = max(vault.registry.rho(vault.user_hash(size.user_id)) for size in index.sizes("target"))
    return {"unit": "item", "epsilon": epsilon_of(rho, config.privacy.delta), "delta": config.privacy.delta}


def _adapter_bytes(config: Config, run_id: str, index: Index) -> float:
    """Mean size of this run's adapters on disk."""
    with closing(open_vault(config)) as vault:
        hashes = [vault.user_hash(size.user_id) for size in index.sizes("target")]
        found = [(user, version) for user in hashes if (version := vault.registry.unit_version(run_id, user))]
        paths = [vault.user_folder(user) / "adapters" / version / TENSORS_NAME for user, version in found]
    sizes = [path.stat().st_size for path in paths if path.exists()]  # not where it is quarantined
    return sum(sizes) / max(1, len(sizes))


def evaluate(config: Config) -> dict[str, Any]:
    """Answer every target user's later items by every arm and compare; resumes where it was stopped."""
    _check_answers(config)
    arms = _arms(config)
    plans = {one.memory: (one, *_plan(one)[1:]) for one in _kinds(config, arms)}
    index = read_index(_folder(config, "prepare"))
    folder, task = _folder(config, "evaluate"), get_task(config.task)
    with _result(config, "evaluate") as result:
        user_ids = _trained_users(config, index)
        arms = [
            arm
            for arm in arms
            if (task.labels or arm.model != "habit") and (arm.model != "swapped" or len(user_ids) > 1)
        ]
        answering = config.evaluate.max_new_tokens, config.evaluate.batch_rows, config.memory.same_construction
        evaluation_ids = {arm.name: _digest(plans[_memory_of(config, arm)][2], *answering, user_ids) for arm in arms}
        num_queries = {user_id: index.entries[user_id].size.num_queries for user_id in user_ids}
        predictions = _resume_predictions(folder / "predictions.jsonl", evaluation_ids, num_queries)
        seen = {(prediction.arm, prediction.user_id) for prediction in predictions}
        left = {arm: [user_id for user_id in user_ids if (arm.name, user_id) not in seen] for arm in arms}
        (folder / "predictions.jsonl").touch(mode=0o600)
        total = sum(num_queries[user_id] for users in left.values() for user_id in users)
        with (
            (folder / "predictions.jsonl").open("a", encoding="utf-8", buffering=1) as file,
            progress_bar("answers", total, "answer", _folder(config, ""), "evaluate") as progress,
        ):
            for prediction in _answers(config, index, list(plans.values()), left, user_ids, progress):
                line = {"evaluation": evaluation_ids[prediction.arm], **dataclasses.asdict(prediction)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                predictions.append(prediction)
                progress.advance(1, 0)
        order = {arm.name: number for number, arm in enumerate(arms)}
        predictions.sort(key=lambda prediction: (order[prediction.arm], prediction.user_id))
        result["fingerprints"] |= {"histories": index.fingerprint, "run": plans[config.memory][2]}
        result["fingerprints"]["evaluations"] = evaluation_ids
        result["was_done"] = total == 0
        result["history"] = {user_id: index.entries[user_id].size.num_items for user_id in user_ids}
        (first,) = read_users(_folder(config, "prepare"), index, user_ids[:1])
        result["has_times"] = first.queries[0].time is not None
        result |= summarise(task, predictions, config.evaluate.num_bootstrap, config.seed)
        print(format_table(task, result))
    return result


def _trained_users(config: Config, index: Index) -> list[str]:
    """The targets who have an adapter for every arm that answers by their own: all arms answer the same queries."""
    user_ids = sorted(size.user_id for size in index.sizes("target") if size.num_queries)
    if not user_ids:
        raise ValueError(_NOTHING_TO_ASK)
    vault = open_vault(config)
    for one in _kinds(config, _own_arms(config)):
        run_id = _plan(one)[2]
        trained = vault.done(run_id, user_ids)
        user_ids = [user_id for user_id in user_ids if user_id in trained]
        if not user_ids:
            raise ValueError(f"run {run_id} has no trained user in {vault.root}: run `train` first")
    vault.close()
    return user_ids[: config.evaluate.max_users or None]


def _answers(
    config: Config,
    index: Index,
    plans: list[tuple[Config, Path, str]],
    left: dict[Arm, list[str]],
    everyone: list[str],
    progress: Progress,
) -> Iterator[Prediction]:
    """Answers by arm for the users in `left`; arms with one kind of prompt in one call, so that workers start once."""
    partner = dict(zip(everyone, [*everyone[1:], everyone[0]], strict=True))
    shards = _shards(config, index)
    for arm, user_ids in left.items():
        if arm.model == "habit":
            users = read_users(_folder(config, "prepare"), index, user_ids)
            yield from answer_by_habit(get_task(config.task), arm.name, users, index.labels)
    for one, task_base, run_id in plans:
        units: list[list[tuple[Any, ...]]] = [[] for _ in shards]
        for arm, user_ids in left.items():
            if arm.model != "habit" and _memory_of(config, arm) == one.memory:
                wanted = set(user_ids)
                for shard, own in zip(shards, units, strict=True):
                    parts = [tuple(user_id for user_id in pack.user_ids if user_id in wanted) for pack in shard]
                    own += [(part, arm.name, tuple(partner[user_id] for user_id in part)) for part in parts if part]
        if any(units):
            yield from run_units(one, task_base, run_id, "answer", units, progress)


def run(config: Config) -> dict[str, Any]:
    """The whole line, from raw histories to the table; the last stage's result, and how many users failed for now."""
    _check_answers(config)
    _check_task(config)
    _check_base(config)
    if not prepare(config)["num_queries"]:
        raise ValueError(f"{_NOTHING_TO_ASK}: run prepare, adapt and train alone")
    _, trained, evaluated = [stage(config) for stage in (adapt, train, evaluate)]
    return {**evaluated, "num_to_retry": trained["num_to_retry"]}


_NOTHING_TO_ASK = "no target user has a later item that is a question with an answer, so there is nothing to evaluate"


def _check_task(config: Config) -> None:
    """Refuse a task, a strategy or an arm that there is not, before anything is read."""
    check_strategy(get_task(config.task), config.task.strategy)
    _arms(config)


def _check_base(config: Config) -> None:
    """Refuse a base that cannot be opened, and target modules that it has not, before anything is trained on it."""
    linears = linear_names(prepare_base(config.base))
    for stage, peft in (("adapt", config.adapt.peft), ("personal", config.personal.peft)):
        for target in targets(peft):
            if target not in linears:
                near = difflib.get_close_matches(target, linears, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                known = ", ".join(sorted(linears))
                raise ValueError(
                    f"{stage}.peft.target_modules: found {target!r}; expected of {config.base.name}: {known}{hint}"
                )


def _check_users(config: Config, users: Sequence[UserHistory]) -> None:
    """Refuse histories that a later stage could do nothing with."""
    num_base = sum(user.role == "base" for user in users)
    if num_base < config.federated.num_shards:
        raise ValueError(f"federated.num_shards is {config.federated.num_shards}, but there are {num_base} base users")
    labels = {item.label for user in users for item in (*user.items, *user.queries)}
    if get_task(config.task).labels and len(labels) == 1:
        raise ValueError(f"all items have the label {labels.pop()!r}; expected at least two labels to tell apart")


def _check_answers(config: Config) -> None:
    if config.base.sharding != "none":
        raise ValueError(
            f"base.sharding is {config.base.sharding!r}, but answering takes a whole base; expected base.sharding=none"
        )


def _shards(config: Config, index: Index) -> list[list[Pack]]:
    """Which packs of target users each worker owns: the same in every stage of a run, longest first."""
    return plan_shards(plan_packs(index.sizes("target"), config.personal), max(1, config.workers.num_workers))


def _plan(config: Config) -> tuple[Index, Path, str]:
    """The prepared index, the task base and the run's id: a digest of all that an adapter depends on."""
    index = read_index(_folder(config, "prepare"))
    path = _own_folder(config, "adapt") / "result.json"
    if not path.exists():
        raise ValueError(f"{path} does not exist: run `adapt` with this config first")
    adapted = json.loads(path.read_text())
    if adapted["fingerprints"]["histories"] != index.fingerprint:
        raise ValueError(f"{path} belongs to other histories than {config.run_dir}/prepare: run `adapt` again")
    values = to_dict(config)
    task_base = adapted["fingerprints"]["task_base"]
    parts = index.fingerprint, task_base, values["personal"], values["task"], config.seed
    run_id = _digest(
        *parts, *config.memory.recipe.items(), *config.privacy.recipe.values(), *config.study.recipe.items()
    )
    if config.privacy.noise_multiplier:  # the id stands in manifests, and a digest of histories would tell them apart
        with closing(open_vault(config)) as vault:
            run_id = hmac.new(vault.derive_key("run"), run_id.encode(), hashlib.sha256).hexdigest()[:16]
    return index, Path(adapted["task_base"]), run_id


def _arms(config: Config) -> list[Arm]:
    return [parse_arm(name) for name in config.evaluate.arms]


def _own_arms(config: Config) -> list[Arm]:
    return [arm for arm in _arms(config) if arm.model == "own"]


def _memory_of(config: Config, arm: Arm) -> MemoryConfig:
    return dataclasses.replace(config.memory, top_k=arm.top_k, with_profile=arm.with_profile)


def _kinds(config: Config, arms: Iterable[Arm]) -> list[Config]:
    """The config once per kind of prompt that `arms` need. The plain kind is always there, and first: it is what gains
    are measured against, and what is served.
    """
    memories = dict.fromkeys([config.memory, *(_memory_of(config, arm) for arm in arms)])
    return [dataclasses.replace(config, memory=memory) for memory in memories]


def _own_folder(config: Config, stage: str) -> Path:
    """A stage's folder for the config's kind of prompt: `<stage>` for the plain kind, `<stage>/k2` with two items."""
    return _folder(config, f"{stage}/{config.memory.name}")


def _folder(config: Config, name: str) -> Path:
    folder = Path(config.run_dir).expanduser().resolve() / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _resume_predictions(path: Path, evaluation_ids: dict[str, str], num_queries: dict[str, int]) -> list[Prediction]:
    """The answers that need not be given again, of each arm's own evaluation id.

    A torn last line leaves the file, and so does a user cut short.
    """
    if not path.exists():
        return []
    kept: list[bytes] = []
    mine: dict[tuple[str, str], list[tuple[bytes, Prediction]]] = {}
    for line in path.read_bytes().split(b"\n")[:-1]:
        values = json.loads(line)
        if values.pop("evaluation") == evaluation_ids.get(values["arm"]):
            mine.setdefault((values["arm"], values["user_id"]), []).append((line, Prediction(**values)))
        else:
            kept.append(line)
    whole = [answers for (_, user_id), answers in mine.items() if len(answers) == num_queries[user_id]]
    kept += [line for answers in whole for line, _ in answers]
    write_atomic(path, b"".join(line + b"\n" for line in kept))
    return [prediction for answers in whole for _, prediction in answers]


@contextmanager
def _result(config: Config, command: str) -> Iterator[dict[str, Any]]:
    """Collects a stage's result and writes it when the stage ends well."""
    started = time.monotonic()
    result: dict[str, Any] = {"command": command, "config": to_dict(config), "hardware": hardware(), "fingerprints": {}}
    yield result
    result["elapsed_s"] = time.monotonic() - started
    write_atomic(_own_folder(config, command) / "result.json", json.dumps(result, indent=1).encode())
