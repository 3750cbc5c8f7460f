"""What a word is, in every script, and what follows from it: limits, counts, BM25 and ROUGE."""

from __future__ import annotations

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from oppu_ray.config import TaskConfig
from oppu_ray.core import Item
from oppu_ray.metrics import score_one
from oppu_ray.retrieval import make_retriever
from oppu_ray.tasks import get_task, make_prompt, one_line
from oppu_ray.words import first_words, last_words, letters, num_words, search_words, words

SCRIPTS = {
    "Russian": "Привет, до завтра и спасибо",
    "Chinese": "我喜欢看电影因为很有意思",
    "Japanese": "ありがとう、また明日ね",
    "Thai": "สวัสดีครับแล้วเจอกันพรุ่งนี้",
    "Arabic": "مرحبا بالعالم شكرا جزيلا",
    "Hindi": "नमस्ते दुनिया कल मिलते हैं",
    "Korean": "안녕 내일 봐 고마워",
    "German": "schöne Grüße für dich",
    "emoji": "😀😀👍🏽👨‍👩‍👧🇩🇪",
}
CHAT, LAMP = get_task(TaskConfig(name="chat_reply")), get_task(TaskConfig(name="email_subject"))


@pytest.mark.parametrize("task", [CHAT, LAMP], ids=lambda task: task.name)
@pytest.mark.parametrize("script", SCRIPTS)
def test_identical_texts_score_1_and_others_less_in_every_script(script: str, task: object) -> None:
    text = SCRIPTS[script]
    assert score_one(task, text, text) == {"rouge1": 1.0, "rougeL": 1.0}  # type: ignore[arg-type]
    half = first_words(text, num_words(text) // 2)
    assert 0.3 < score_one(task, text, half)["rouge1"] < 1  # type: ignore[arg-type]
    others = [other for name, other in SCRIPTS.items() if name != script]
    assert all(score_one(task, text, other)["rouge1"] < 0.2 for other in others)  # type: ignore[arg-type]


def test_letters_are_not_dropped_from_a_word() -> None:
    assert score_one(CHAT, "für", "f r")["rouge1"] == 0.0
    assert score_one(CHAT, "e\u0301te\u0301", "\u00e9t\u00e9")["rouge1"] == 1.0  # two ways to write one letter
    assert score_one(CHAT, "?!", "?!")["rouge1"] == 1.0 and score_one(CHAT, "?!", "no")["rouge1"] == 0.0


def test_lamps_scorer_is_kept_where_lamp_is_scored() -> None:
    theirs = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    draw = random.Random(0)
    vocabulary = ["Re:", "the", "don't", "3.5%", "naïve", "café_au", "“quoted”", "A-B", "x", "..."]
    for _ in range(200):
        gold, answer = (" ".join(draw.choices(vocabulary, k=draw.randint(1, 8))) for _ in range(2))
        expected = {name: score.fmeasure for name, score in theirs.score(gold, answer).items()}
        if any(word.isascii() for word in letters(gold)) and gold.isascii():
            assert score_one(LAMP, gold, answer) == expected
    assert score_one(LAMP, "a naïve café", "a na ve caf") == {"rouge1": 1.0, "rougeL": 1.0}  # as theirs has it


def test_in_scripts_with_spaces_words_are_what_stands_between_them() -> None:
    for text in ("hello,  world", "a\tb\nc", "Привет, мир", "Acme™ – “quoted” ©2020", ""):
        assert words(text) == text.split() and search_words(text) == text.split(" ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_limit_in_words_cuts_every_script(script: str) -> None:
    text = SCRIPTS[script]
    assert num_words(text) >= 4
    assert num_words(first_words(text, 2)) == num_words(last_words(text, 2)) == 2
    assert text.startswith(first_words(text, 2)) and text.endswith(last_words(text, 2))
    assert first_words(text, 99) == last_words(text, 99) == text and first_words(text, 0) == last_words(text, 0) == ""
    assert one_line(f" {text} ", 3) == first_words(text, 3)
    prompt = make_prompt(CHAT, Item("a", context=(text, text)), "shared_first", num_words(text) + 1)
    assert prompt.input == f"{last_words(text, 1)}\n{text}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_bm25_finds_the_item_that_shares_words(script: str) -> None:
    text = SCRIPTS[script]
    others = [other for name, other in SCRIPTS.items() if name != script]
    texts = [*others, text, *others]
    retriever = make_retriever("bm25", texts, [str(number) for number in range(len(texts))], 0)
    query = last_words(text, 2)
    assert [hit.index for hit in retriever.search(query, 1)] == [len(others)]
