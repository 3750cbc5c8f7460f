"""Packing: what is cut and what never is, the same plan for any order of arrival, and rows that lose no token."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import random_examples
from tiny import tiny_tokenizer

from oppu_ray.config import PeftConfig, TrainConfig
from oppu_ray.core import Example, Pack, Prompt, TrainingPair, UserSize
from oppu_ray.packing import (
    MAX_WORDS_PER_PACK,
    PackForecast,
    Row,
    build_stream,
    encode,
    encode_prompt,
    first_tokens,
    make_rows,
    num_steps,
    plan_packs,
    plan_passes,
    plan_shards,
    plan_user,
    shared_prefix,
    virtual_tokens,
)
from oppu_ray.plan import PlanConfig, simulate_users

TOKENIZER = tiny_tokenizer()
PROMPT = Prompt("which tag?", "a long film about robots", "tag:", "likes robots", ("seen: one", "seen: two"))


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def cut_to(prompt: Prompt, num: int) -> str:
    """The prompt as text after cutting it to `num` letters."""
    return "".join(map(chr, encode_prompt(prompt, letters, num)))


def read(example: Example) -> tuple[str, str]:
    """Prompt and completion as text, special tokens included."""
    ids, num = list(example.input_ids), example.num_prompt
    return str(TOKENIZER.decode(ids[:num])), str(TOKENIZER.decode(ids[num:]))


def test_memory_is_cut_first_and_from_its_end_then_the_input() -> None:
    whole = "likes robots\nwhich tag?\nseen: one\nseen: two\na long film about robots\ntag:"
    assert cut_to(PROMPT, 1000) == cut_to(PROMPT, len(whole)) == whole
    without_second = whole.replace("\nseen: two", "")
    assert cut_to(PROMPT, len(whole) - 1) == without_second
    without_memory = without_second.replace("\nseen: one", "")
    assert cut_to(PROMPT, len(without_second) - 1) == without_memory
    assert cut_to(PROMPT, len(without_memory) - 7) == "likes robots\nwhich tag?\na long film about\ntag:"
    assert cut_to(PROMPT, 0) == "likes robots\nwhich tag?\ntag:"  # what is asked stays, whatever the room


def test_memory_is_cut_first_in_the_papers_order_too() -> None:
    paper = replace(PROMPT, order="paper")
    assert cut_to(paper, 62) == "likes robots\nwhich tag?\na long film about robots\ntag:"
    assert cut_to(paper, 63) == "likes robots\nseen: one\nwhich tag?\na long film about robots\ntag:"


def test_the_start_token_counts_and_stays() -> None:
    ids = encode_prompt(Prompt("ask", "abcdef", "cue"), letters, 12, start=(7,))
    assert ids == (7, *letters("ask\nabc\ncue")) and len(ids) == 12


@pytest.mark.parametrize("max_length", [200, 60, 40, 30])
def test_an_example_keeps_its_completion_and_its_cue(max_length: int) -> None:
    example = encode(TrainingPair(PROMPT, " science fiction", "i1"), TOKENIZER, max_length)
    prompt, completion = read(example)
    assert completion == " science fiction<|im_end|>" and prompt.endswith("tag:")
    assert example.num_completion == len(TOKENIZER(" science fiction")["input_ids"]) + 1
    assert len(example.input_ids) <= max_length
    assert prompt.startswith("likes robots\nwhich tag?") or max_length == 30


def test_a_completion_is_cut_only_where_it_alone_is_too_long() -> None:
    example = encode(TrainingPair(PROMPT, " " + "x" * 50, "i1"), TOKENIZER, 20)
    assert len(example.input_ids) == 20 and example.num_prompt == 1
    assert read(example) == (":", " " + "x" * 18)


def test_an_empty_completion_is_refused_with_its_item() -> None:
    with pytest.raises(ValueError, match="item 'i1': the completion is empty"):
        encode(TrainingPair(PROMPT, " \n", "i1"), TOKENIZER, 100)


def test_a_tokenizers_own_first_token_stands_before_the_prompt() -> None:
    class WithStart:
        eos_token_id = TOKENIZER.eos_token_id

        def __call__(self, text: str, add_special_tokens: bool = True, **_: bool) -> dict[str, list[int]]:
            ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [TOKENIZER.bos_token_id, *ids] if add_special_tokens else ids}

    assert first_tokens(TOKENIZER) == () and first_tokens(WithStart()) == (TOKENIZER.bos_token_id,)
    pair = TrainingPair(PROMPT, " funny", "i1")
    plain, started = encode(pair, TOKENIZER, 200), encode(pair, WithStart(), 200)
    assert started.input_ids == (TOKENIZER.bos_token_id, *plain.input_ids)
    for max_length in (12, 4, 3):  # it stays even where the instruction does not
        example = encode(pair, WithStart(), max_length)
        assert example.input_ids[0] == TOKENIZER.bos_token_id and len(example.input_ids) == max_length
    assert started.num_prompt == plain.num_prompt + 1


def test_a_users_steps_hold_every_example_once_an_epoch_in_the_users_own_order() -> None:
    examples, config = random_examples(0, 10), TrainConfig(epochs=3, items_per_step=4)
    work = plan_user("ann", 5, examples, config)
    assert [len(step) for step in work.steps] == [4, 4, 2] * 3
    epochs = [sum(work.steps[i : i + 3], ()) for i in (0, 3, 6)]
    assert all(sorted(epoch, key=repr) == sorted(examples, key=repr) for epoch in epochs)
    assert len(set(epochs)) == 3
    assert work == plan_user("ann", 5, examples, config)
    assert plan_user("bob", 5, examples, config).steps == work.steps != plan_user("ann", 6, examples, config).steps


def test_max_steps_overrides_epochs() -> None:
    config = TrainConfig(epochs=1, items_per_step=4, max_steps=5)
    assert [len(step) for step in plan_user("ann", 0, random_examples(0, 6), config).steps] == [4, 2, 4, 2, 4]


@pytest.mark.timeout(20)  # without examples there is nothing to fill five steps with, however long one tries
@pytest.mark.parametrize("max_steps", [0, 5])
def test_a_user_without_examples_has_no_steps(max_steps: int) -> None:
    assert plan_user("ann", 0, [], TrainConfig(max_steps=max_steps)).steps == ()


sizes = st.lists(st.tuples(st.integers(1, 400), st.integers(1, 9000)), min_size=1, max_size=40).map(
    lambda counts: [UserSize(f"user{i}", items, words) for i, (items, words) in enumerate(counts)]
)


@given(sizes, st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_packs_do_not_depend_on_the_order_of_arrival(users: list[UserSize], draw: random.Random) -> None:
    config = TrainConfig(max_users_per_pack=4, items_per_step=16)
    packs = plan_packs(users, config)
    assert packs == plan_packs(draw.sample(users, len(users)), config)
    assert sorted(user for pack in packs for user in pack.user_ids) == sorted(user.user_id for user in users)
    words = {user.user_id: user.num_words for user in users}
    assert all(pack.num_words == sum(words[user] for user in pack.user_ids) for pack in packs)
    steps = {user.user_id: -(-user.num_items // 16) for user in users}
    lengths = [steps[user] for pack in packs for user in pack.user_ids]
    assert lengths == sorted(lengths, reverse=True)
    for pack, after in zip(packs, [*packs[1:], None], strict=True):
        longest = steps[pack.user_ids[0]]
        assert len(pack.user_ids) <= 4 and all(2 * steps[user] >= longest for user in pack.user_ids)
        if after:  # a pack ends only because it is full or the next user is too small for it
            assert len(pack.user_ids) == 4 or 2 * steps[after.user_ids[0]] < longest


def test_long_histories_make_small_packs_and_a_giant_is_alone() -> None:
    words = {"giant": MAX_WORDS_PER_PACK + 1, **{f"long-{i}": MAX_WORDS_PER_PACK // 3 for i in range(4)}, "short": 10}
    users = [UserSize(user_id, 100, num) for user_id, num in words.items()]
    assert [pack.user_ids for pack in plan_packs(users, TrainConfig())] == [
        ("giant",),
        ("long-0", "long-1", "long-2"),
        ("long-3", "short"),
    ]


def test_with_a_fixed_number_of_steps_users_of_all_sizes_share_packs() -> None:
    users = [UserSize("big", 1000, 900), UserSize("small", 2, 10)]
    assert len(plan_packs(users, TrainConfig())) == 2
    assert [pack.user_ids for pack in plan_packs(users, TrainConfig(max_steps=5))] == [("big", "small")]


@given(st.lists(st.integers(1, 5000), max_size=30), st.integers(1, 6), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_shards_are_balanced_whatever_the_order(words: list[int], num: int, draw: random.Random) -> None:
    packs = [Pack(number, (f"user{number}",), count) for number, count in enumerate(words)]
    shards = plan_shards(packs, num)
    assert shards == plan_shards(draw.sample(packs, len(packs)), num) and len(shards) == num
    assert sorted((pack for shard in shards for pack in shard), key=lambda pack: pack.pack_id) == packs
    loads = [sum(pack.num_words for pack in shard) for shard in shards]
    for shard, load in zip(shards, loads, strict=True):  # no shard's last pack would have been better off elsewhere
        assert not shard or load - min(pack.num_words for pack in shard) <= min(loads)


# Two letters only, so that prefixes happen.
example_lists = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=6), st.lists(st.integers(0, 1), min_size=1, max_size=3)),
    min_size=1,
    max_size=8,
).map(lambda pairs: [Example((*prompt, *completion), len(prompt)) for prompt, completion in pairs])


@given(example_lists)
@settings(max_examples=100, deadline=None)
def test_the_shared_prefix_is_the_longest_and_never_reaches_into_a_completion(examples: list[Example]) -> None:
    prompts = [example.input_ids[: example.num_prompt] for example in examples]
    lengths = [num for num in range(min(map(len, prompts)) + 1) if len({prompt[:num] for prompt in prompts}) == 1]
    assert shared_prefix(examples) == (max(lengths) if len(examples) > 1 else 0)


@given(example_lists, st.integers(1, 30), st.booleans(), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_rows_hold_every_example_in_order_within_the_limit(
    examples: list[Example], max_tokens: int, share: bool, num_virtual: int
) -> None:
    rows = make_rows(3, examples, max_tokens, share, num_virtual)
    assert [example for row in rows for example in row.examples] == examples
    for row in rows:
        assert (row.slot, row.num_virtual) == (3, num_virtual)
        assert row.num_prefix == shared_prefix(row.examples)
        assert row.num_tokens <= max_tokens or len(row.examples) == 1
        assert share or len(row.examples) == 1
        stream = build_stream([row], torch.device("cpu"))
        assert len(stream.input_ids_T) == row.num_tokens
    weights = [row.weight for row in rows for example in row.examples for _ in range(example.num_completion)]
    assert sum(weights) == pytest.approx(1.0) and len(set(weights)) == 1


def test_passes_hold_rows_in_slot_order_within_the_limit() -> None:
    rows = [row for slot in (2, 0, 1) for row in make_rows(slot, random_examples(slot, 9), 60)]
    passes = plan_passes(rows, 100)
    assert [row for part in passes for row in part] == sorted(rows, key=lambda row: row.slot)
    assert all(sum(row.num_tokens for row in part) <= 100 for part in passes) and len(passes) > 2
    long = Row(0, (Example(tuple(range(300)), 299),), 0)
    assert plan_passes([rows[0], long], 100) == [[long], [rows[0]]]


def test_a_stream_is_laid_out_as_the_worked_example_says() -> None:
    p, q, a, b, c, d, e = range(7)
    shared = Row(0, (Example((p, q, a, b), 3), Example((p, q, c, d, e), 3)), 2, weight=0.5)
    alone = Row(2, (Example((p, q, e), 2),), 0, weight=0.25, num_virtual=2)
    base = Row(-1, (Example((d, e), 1),), 0)
    stream = build_stream([base, shared, alone], torch.device("cpu"))
    assert stream.input_ids_T.tolist() == [d] + [p, q, a, c, d] + [0, 0, p, q]
    assert stream.position_ids_T.tolist() == [0] + [0, 1, 2, 2, 3] + [0, 1, 2, 3]
    assert stream.plan.wanted_K[stream.predict_C].tolist() == [0, 3, 4, 5, 9]
    assert stream.targets_C.tolist() == [e, b, d, e, e]
    assert stream.weights_C.tolist() == [1.0, 0.5, 0.5, 0.5, 0.25]
    assert stream.owner_C.tolist() == [0, 1, 2, 2, 3] and stream.slot_C.tolist() == [-1, 0, 0, 0, 2]
    assert stream.ranges == [(-1, 0, 1), (0, 1, 6), (2, 6, 10)] and stream.virtual == [(2, 6, 8)]


def test_a_completion_that_follows_the_prefix_at_once_is_predicted_by_the_prefix() -> None:
    row = Row(0, (Example((5, 6, 7), 2), Example((5, 6, 8, 9), 2)), 2)
    stream = build_stream([row], torch.device("cpu"))
    assert stream.input_ids_T.tolist() == [5, 6, 8]
    assert stream.plan.wanted_K.tolist() == [1, 2] and stream.predict_C.tolist() == [0, 0, 1]


def test_only_prompt_tuning_has_virtual_tokens() -> None:
    kinds = (None, PeftConfig(), PeftConfig(kind="ia3"), PeftConfig(kind="prompt", num_virtual_tokens=5))
    assert [virtual_tokens(peft) for peft in kinds] == [0, 0, 0, 5]


def training(shard: Sequence[Pack], sizes: dict[str, UserSize], config: TrainConfig) -> Iterator[tuple[float, str]]:
    """The steps of a worker that trains 500 tokens a second: when each ends, and whose it was."""
    at = 0.0
    for pack in shard:
        left = {user: num_steps(sizes[user].num_items, config) for user in pack.user_ids}
        for step in range(max(left.values())):
            users = [user for user, wanted in left.items() if wanted > step]
            for user in users:
                # Beside its words a step has 100 tokens of prompt, and a user's words have 1 to 2 tokens.
                per_epoch = -(-sizes[user].num_items // config.items_per_step)
                at += (100 + sizes[user].num_words / per_epoch * (1 + random.Random(user).random())) / 500
            yield from ((at, user) for user in users)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_workers", [1, 4])
def test_after_a_tenth_the_time_left_is_right_within_a_factor_of_two(num_workers: int, seed: int) -> None:
    config = TrainConfig(max_users_per_pack=4)
    users = simulate_users(PlanConfig(users=160, max_items=400, seed=seed))
    sizes = {user.user_id: user for user in users}
    shards = plan_shards(plan_packs(users, config), num_workers)
    now, load_s, checked = 0.0, 60.0, 0
    forecast = PackForecast(shards, users, config, lambda: now)
    now = load_s
    forecast.begin()
    steps = sorted(step for shard in shards for step in training(shard, sizes, config))
    end = steps[-1][0]
    for at, user in steps:
        now = load_s + at
        forecast.stepped([user])
        if 0.1 < at / end < 0.98:
            assert forecast.left_s is not None and 0.5 < forecast.left_s / (end - at) < 2.0
            assert abs(forecast.share - at / end) < 0.2
            checked += 1
    assert checked > 1000 and forecast.share == pytest.approx(1.0)


def test_work_of_an_earlier_run_and_of_users_who_fail_says_nothing_about_speed() -> None:
    config = TrainConfig(epochs=1, items_per_step=1)
    users = [UserSize(name, 10, 100) for name in ("before", "failed", "done", "left")]
    now = 0.0
    packs = [Pack(number, (user.user_id,), 100) for number, user in enumerate(users)]
    forecast = PackForecast([packs], users, config, lambda: now)
    forecast.user_done("before")
    now = 1.0
    forecast.user_done("failed")
    assert (forecast.share, forecast.left_s) == (0.5, None)
    now = 20.0
    forecast.stepped(["done"] * 11)  # one more than it has: a lost worker's step was taken again
    forecast.user_done("done")
    assert (forecast.share, forecast.left_s) == (0.75, 20.0)
    now = 25.0
    assert forecast.left_s == 15.0
