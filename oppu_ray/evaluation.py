"""Answers by every arm, and what they prove: scores, paired gains with intervals, and controls (design decision D9).

In: users with queries, and per arm a way to answer. Out: `Prediction`s, and from them the `arms`, `gains` and
`controls` of result.json and a table.
The decision a reader would question: gains are paired, query by query, against the task-adapted model, never against
the untouched base; what they prove, over queries and over users, is in `statistics.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from oppu_ray.adapters import peft_from_dict
from oppu_ray.base_model import Base
from oppu_ray.config import Config
from oppu_ray.core import AdapterState, Example, Item, Prediction, Request, UserHistory
from oppu_ray.inference import Engine
from oppu_ray.memory import Memory
from oppu_ray.metrics import LOWER_IS_BETTER, main_metric, score_answers, score_one
from oppu_ray.packing import encode_prompt, first_tokens, plain_tokenizer
from oppu_ray.statistics import paired_gain
from oppu_ray.tasks import Task, make_prompt, parse_answer, target_text

HEURISTIC_ARMS = ("majority_global", "majority_user", "last_user")
PLAIN_ARMS = {"base": "base", "task": "task", "oppu": "own", "swapped": "swapped"}
MEMORY_ARM = re.compile(r"(rag(?=_k)|pag|oppu_pag|oppu(?=_k))(?:_k([1-9]\d{0,3}))?")


Key = tuple[str, str]  # user, query


@dataclass(frozen=True)
class Arm:
    """One way to answer.

    Args:
        name: As in `evaluate.arms`: `majority_global`, `majority_user`, `last_user`, `base`, `task`, `oppu`, `swapped`,
            `rag_k<K>`, `pag`, `pag_k<K>`, `oppu_k<K>`, `oppu_pag` or `oppu_pag_k<K>`.
        model: "habit" (none), "base", "task" (the task-adapted one), or with the adapter "own" or "swapped".
        top_k, with_profile: What of the user's past stands in the prompt.
        control: The arm that shows what the own adapter does beyond this: another user's adapter in the same plain
            prompts, the task-adapted model with the same memory; "" for arms without an own adapter.
    """

    name: str
    model: str
    top_k: int = 0
    with_profile: bool = False
    control: str = ""


def parse_arm(name: str) -> Arm:
    """The arm called `name`.

    Raises:
        ValueError: There is no such arm.
    """
    if name in HEURISTIC_ARMS:
        return Arm(name, "habit")
    if name in PLAIN_ARMS:
        return Arm(name, PLAIN_ARMS[name], control="swapped" if name == "oppu" else "")
    match = MEMORY_ARM.fullmatch(name)
    if match is None:
        known = ", ".join([*HEURISTIC_ARMS, *PLAIN_ARMS, "rag_k<K>, oppu_k<K>, pag, oppu_pag, pag_k<K>, oppu_pag_k<K>"])
        near = difflib.get_close_matches(name, [*HEURISTIC_ARMS, *PLAIN_ARMS, "rag_k1", "oppu_k1", "oppu_pag"], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"evaluate.arms: {name!r} is unknown; expected one of {known} (K: 1 to 9999){hint}")
    kind, top_k = match[1], int(match[2] or 0)
    control = ""
    if kind.startswith("oppu"):
        control = name.removeprefix("oppu_") if kind == "oppu_pag" else name.replace("oppu", "rag")
    return Arm(name, "own" if control else "task", top_k, "pag" in kind, control)


def answer_by_habit(task: Task, arm: str, users: Sequence[UserHistory], labels: dict[str, int]) -> list[Prediction]:
    """The arms that read no text: the base users' majority label, the user's own majority, the user's last label."""
    most_common = max(labels, key=lambda label: (labels[label], label)) if labels else ""
    predictions = []
    for user in users:
        own = Counter(item.label for item in user.items if item.label)
        last = next((item.label for item in reversed(user.items) if item.label), most_common)
        majority = max(own, key=lambda label: (own[label], label == last, label)) if own else most_common
        text = {"majority_global": most_common, "majority_user": majority, "last_user": last}[arm]
        predictions += [
            Prediction(arm, user.user_id, query.item_id, target_text(task, query), text) for query in user.queries
        ]
    return predictions


def answer_users(
    base: Base,
    task: Task,
    config: Config,
    arm: str,
    users: Sequence[UserHistory],
    adapters: Sequence[AdapterState] | None = None,
    memories: Sequence[Memory | None] | None = None,
) -> list[Prediction]:
    """One model arm's answers: greedy text, the gold's likelihood, and for closed label sets the likeliest label.

    Args:
        adapters: One per user, or None for the model alone.
        memories: One per user, or None for prompts without a user's past.
    """
    pefts = {peft_from_dict(adapter.peft_config) for adapter in adapters or ()}
    engine = Engine(base.model, max(len(users), 1), sorted(pefts, key=str), max_rows=config.evaluate.batch_rows)
    try:
        for user, adapter in zip(users, adapters or (), strict=bool(adapters)):
            engine.load(user.user_id, adapter)
        queries = [(user.user_id, query) for user in users for query in user.queries]
        names = [user_id if adapters else None for user_id, _ in queries]
        prompts = [
            encode_query(base, task, config, query, memory)
            for user, memory in zip(users, memories or [None] * len(users), strict=True)
            for query in user.queries
        ]
        tokenize = plain_tokenizer(base.tokenizer)
        longest = max((len(tokenize(" " + label)) for label in task.labels), default=config.evaluate.max_new_tokens)
        num_new = min(config.evaluate.max_new_tokens, longest + 1)
        requests = [
            Request(str(i), prompt, name, num_new) for i, (prompt, name) in enumerate(zip(prompts, names, strict=True))
        ]
        answers = engine.generate(requests, stop_ids(base))
        golds = [target_text(task, query) for _, query in queries]
        asked = [[gold, *(label for label in task.labels if label != gold)] for gold in golds]
        scored = [
            (name, [_example(base, prompt, option) for option in options])
            for name, prompt, options in zip(names, prompts, asked, strict=True)
        ]
        nlls = engine.score(scored)
    finally:
        engine.close()
    predictions = []
    for (user_id, query), options, answer, (_, examples), nll in zip(
        queries, asked, answers, scored, nlls, strict=True
    ):
        totals = [mean * example.num_completion for mean, example in zip(nll, examples, strict=True)]
        label = options[int(np.argmin(totals))] if task.labels else None
        text = parse_answer(task, str(base.tokenizer.decode(list(answer.token_ids), skip_special_tokens=True)))
        predictions.append(Prediction(arm, user_id, query.item_id, options[0], text, nll[0], label))
    return predictions


def encode_query(base: Base, task: Task, config: Config, query: Item, memory: Memory | None = None) -> tuple[int, ...]:
    """A query's prompt in tokens, built just as in training."""
    max_words = config.task.max_input_words if config.memory.same_construction else 0
    prompt = make_prompt(task, query, config.task.prompt_order, max_words)
    if memory:
        prompt = memory.add(prompt, query.item_id)
    room = config.personal.max_length + config.memory.num_extra_tokens - config.evaluate.max_new_tokens
    return encode_prompt(prompt, plain_tokenizer(base.tokenizer), room, first_tokens(base.tokenizer))


def complete(base: Base, prompts: Sequence[str], max_new_tokens: int, max_rows: int) -> list[str]:
    """What the base says to each prompt, of which it reads the last 2,048 tokens: for profiles."""
    tokenize, start = plain_tokenizer(base.tokenizer), first_tokens(base.tokenizer)
    requests = [
        Request(str(i), (*start, *tokenize(prompt)[-2048:]), max_new_tokens=max_new_tokens)
        for i, prompt in enumerate(prompts)
    ]
    engine = Engine(base.model, 1, [], max_rows=max_rows)
    try:
        answers = engine.generate(requests, stop_ids(base))
    finally:
        engine.close()
    return [str(base.tokenizer.decode(list(answer.token_ids), skip_special_tokens=True)) for answer in answers]


def stop_ids(base: Base) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's and the model's own end of sequence."""
    own = getattr(base.model.generation_config, "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return frozenset(token for token in (base.tokenizer.eos_token_id, *listed) if token is not None)


def _example(base: Base, prompt: tuple[int, ...], target: str) -> Example:
    completion = [*plain_tokenizer(base.tokenizer)(" " + target), base.tokenizer.eos_token_id]
    return Example((*prompt, *completion), len(prompt))


def summarise(task: Task, predictions: Sequence[Prediction], num_bootstrap: int, seed: int) -> dict[str, Any]:
    """Scores per arm and paired gains.

    Returns:
        `arms.<arm>`: the task's metrics, also `_by_label` (the likeliest label), `nll`, `num_queries`, `num_users`.
        `gains.<arm>`: over the task-adapted model, in the task's first metric; `nll_gains` the same in nats per token;
        `controls.<arm>`: of arms with an own adapter, over `Arm.control`. More is better in all of them.
    """
    by_arm = answers_by_arm(predictions)
    arms = {arm: score_arm(task, list(answers.values())) for arm, answers in by_arm.items()}

    def compare(arm: str, over: str, metric: str) -> dict[str, Any]:
        answers, reference = by_arm[arm], by_arm[over]
        gain = paired_gain(*paired_gains(task, answers, reference, metric), num_bootstrap, seed)
        changed = share_changed(answers, reference)
        return {"over": over, "metric": metric, **dataclasses.asdict(gain), "changed": changed}

    metric = main_metric(task)
    others = [arm for arm in by_arm if arm != "task"] if "task" in by_arm else []
    modelled = [arm for arm in others if arm not in HEURISTIC_ARMS]
    controls = [(arm, control) for arm in by_arm if (control := parse_arm(arm).control) in by_arm]
    return {
        "arms": arms,
        "gains": {arm: compare(arm, "task", metric) for arm in others},
        "nll_gains": {arm: compare(arm, "task", "nll") for arm in modelled},
        "controls": {arm: compare(arm, control, metric) for arm, control in controls},
        "nll_controls": {arm: compare(arm, control, "nll") for arm, control in controls},
    }


def answers_by_arm(predictions: Iterable[Prediction]) -> dict[str, dict[Key, Prediction]]:
    """Arm -> (user, query) -> answer; of two answers to one query the later one counts."""
    by_arm: dict[str, dict[Key, Prediction]] = {}
    for prediction in predictions:
        by_arm.setdefault(prediction.arm, {})[prediction.user_id, prediction.query_id] = prediction
    return by_arm


def score_arm(task: Task, answers: list[Prediction]) -> dict[str, float]:
    """The arm's metrics over all queries, by the free answer and by the likeliest label, and the mean nll."""
    golds = [answer.gold for answer in answers]
    scores = dict(score_answers(task, golds, [answer.text for answer in answers]))
    if all(answer.label_text is not None for answer in answers):
        by_label = score_answers(task, golds, [answer.label_text or "" for answer in answers])
        scores |= {f"{name}_by_label": value for name, value in by_label.items()}
    if all(answer.nll is not None for answer in answers):
        scores["nll"] = float(np.mean([answer.nll for answer in answers]))  # type: ignore[misc]
    return scores | {"num_queries": len(answers), "num_users": len({answer.user_id for answer in answers})}


def paired_gains(
    task: Task, answers: dict[Key, Prediction], reference: dict[Key, Prediction], metric: str
) -> tuple[np.ndarray, list[str]]:
    """How much better `answers` is than `reference` in `metric` on each query of both, and whose query it is."""
    common = sorted(answers.keys() & reference.keys())

    def value(prediction: Prediction) -> float:
        return prediction.nll or 0.0 if metric == "nll" else score_one(task, prediction.gold, prediction.text)[metric]

    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    gain_Q = np.array([sign * (value(answers[key]) - value(reference[key])) for key in common])
    return gain_Q, [user_id for user_id, _ in common]


def share_changed(answers: dict[Key, Prediction], reference: dict[Key, Prediction]) -> float:
    """Share of the queries of both whose free answer is another one."""
    return float(np.mean([answers[key].text != reference[key].text for key in answers.keys() & reference.keys()]))


EXPLAINED = {
    "majority_global": "the base users' most common label",
    "majority_user": "the user's own most common label",
    "last_user": "the user's last label",
    "base": "the base model, no training",
    "task": "task-adapted, same for everyone",
    "oppu": "OPPU: the user's own adapter",
    "swapped": "control: another user's adapter",
}


def explain(name: str) -> str:
    """What answers, in a few words."""
    if name in EXPLAINED:
        return EXPLAINED[name]
    arm = parse_arm(name)
    memory = [f"{arm.top_k} past item{'s' * (arm.top_k > 1)}"] * (arm.top_k > 0) + ["profile"] * arm.with_profile
    return f"{'OPPU' if arm.model == 'own' else 'task-adapted'}, prompt with {' and '.join(memory)}"


def format_table(task: Task, summary: dict[str, Any]) -> str:
    """The summary as text: one line per arm with its gain over the task-adapted model and the 95 % interval."""
    metrics = [*task.metrics, "nll"]
    head = f"{'arm':<17} {'what answers':<42}" + "".join(f"{name:>10}" for name in metrics) + "   gain over task [95 %]"
    lines = [head, "-" * len(head)]
    for arm, scores in summary["arms"].items():
        shown = "".join(f"{scores[name]:>10.3f}" if name in scores else f"{'-':>10}" for name in metrics)
        gain = summary["gains"].get(arm)
        tail = f"   {gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]" if gain else ""
        lines.append(f"{arm:<17} {explain(arm):<42}{shown}{tail}")
    for name, kind in (("gains", "over task, by user"), ("nll_gains", "over task, nats per token")):
        if gain := summary[name].get("oppu"):
            low, high, mean = (
                (gain["by_user_low"], gain["by_user_high"], gain["by_user_mean"])
                if name == "gains"
                else (gain["low"], gain["high"], gain["mean"])
            )
            lines.append(f"OPPU {kind}: {mean:+.3f} [{low:+.3f}, {high:+.3f}]")
    for name, kind in (("controls", "answers"), ("nll_controls", "nats per token")):
        for arm, gain in summary[name].items():
            over = "OPPU over another user's adapter" if arm == "oppu" else f"{arm} over {gain['over']}"
            lines.append(f"{over}, {kind}: {gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]")
    if gain := summary["gains"].get("oppu"):
        lines.append(f"OPPU changed {gain['changed']:.0%} of the task model's answers.")
    return "\n".join(lines)
