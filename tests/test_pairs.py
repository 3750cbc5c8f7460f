import pytest

from oppu_ray.config import TaskConfig
from oppu_ray.core import Item, TrainingPair
from oppu_ray.pairs import make_pairs
from oppu_ray.tasks import TASKS, Task, get_task, render_prompt

TWEET = Item("t1", text="Vote  today:\npolls close at eight tonight, folks!")
PAPER = Item("p1", text="Parsing fast", title="Chart parsing", abstract="We parse.\nFast.")
CITATION_QUERY = Item("q1", text="Parsing faster", label="[2]", options=("Tagging", "Parsing fast"))


def pair(name: str, item: Item, strategy: str = "") -> TrainingPair:
    config = TaskConfig(name=name, strategy=strategy)
    (made,) = make_pairs(get_task(config), [item], config)
    return made


def read(made: TrainingPair) -> tuple[str, str]:
    return render_prompt(made.prompt), made.completion


def test_an_item_with_question_and_answer_is_asked_like_a_query() -> None:
    config = TaskConfig(name="LaMP-2M", labels=("sci-fi", "comedy"), max_input_words=2)
    items = [Item("a", text="robots in love", label="sci-fi"), Item("b", text="a wedding", label="comedy")]
    pairs = make_pairs(get_task(config), items, config)
    ask = "Which tag fits this movie? Answer with one of: sci-fi, comedy.\n"
    assert [read(made) for made in pairs] == [
        (ask + "description: robots in\ntag:", " sci-fi"),
        (ask + "description: a wedding\ntag:", " comedy"),
    ]
    assert [made.item_id for made in pairs] == ["a", "b"]


def test_a_tweet_with_keywords_and_a_paper_with_options_are_aligned_whatever_the_strategy() -> None:
    tweet = Item("t2", text="Vote today!", keywords="today, vote")
    for strategy in ("", "stem", "completion"):
        prompt, completion = read(pair("LaMP-7", tweet, strategy))
        assert prompt.endswith("content: today, vote\ntweet:") and completion == " Vote today!"
    prompt, completion = read(pair("LaMP-1", CITATION_QUERY, "title_to_abstract"))
    assert prompt.endswith("[1]: Tagging\n[2]: Parsing fast\npaper title: Parsing faster\nreference:")
    assert completion == " [2]"


@pytest.mark.parametrize(
    ("name", "item", "strategy", "prompt", "completion"),
    [
        ("LaMP-7", TWEET, "", "tweet:", " Vote today: polls close at eight tonight, folks!"),
        ("LaMP-7", TWEET, "next_token", "tweet:", " Vote today: polls close at eight tonight, folks!"),
        ("LaMP-7", TWEET, "stem", "tweet:", " Vote today: polls close at eight tonight, folks!"),
        ("LaMP-7", TWEET, "completion", "tweet: Vote", " today: polls close at eight tonight, folks!"),
        ("LaMP-7", Item("t3", text="Vote!"), "completion", "tweet:", " Vote!"),
        ("LaMP-1", PAPER, "", "paper title:", " Parsing fast reference: Chart parsing abstract: We parse. Fast."),
        ("LaMP-1", Item("p2", text="Parsing fast"), "", "paper title:", " Parsing fast"),
        ("LaMP-1", PAPER, "stem", "paper title: Parsing fast\nreference:", " Chart parsing"),
        ("LaMP-1", PAPER, "title_to_abstract", "paper title: Parsing fast\nabstract:", " We parse. Fast."),
    ],
)
def test_strategies_for_items_without_a_pair(
    name: str, item: Item, strategy: str, prompt: str, completion: str
) -> None:
    assert read(pair(name, item, strategy)) == (prompt, completion)


def test_each_unaligned_task_has_a_default_and_refuses_other_strategies_by_name() -> None:
    assert {task.name: task.strategies for task in TASKS if task.strategies} == {
        "citation": ("next_token", "stem", "title_to_abstract"),
        "tweet_paraphrase": ("next_token", "stem", "completion"),
    }
    with pytest.raises(ValueError, match="'completion' does not fit citation; expected one of: next_token, stem"):
        pair("LaMP-1", PAPER, "completion")
    film = Item("a", text="robots", label="sci-fi")
    assert pair("LaMP-2M", film, "stem") == pair("LaMP-2M", film)  # as preset code-compat has it: nothing to do
    with pytest.raises(ValueError, match="strategy: found 'guess'; expected '', 'next_token', 'stem', 'completion' or"):
        pair("LaMP-2M", film, "guess")


def test_an_item_too_poor_for_its_strategy_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="item 'p2': .*options, label empty.*'stem'; .*: next_token, title_to"):
        pair("LaMP-1", Item("p2", text="Parsing fast"), "stem")
    with pytest.raises(ValueError, match="item 'p2': .*'title_to_abstract'"):
        pair("LaMP-1", Item("p2", text="Parsing fast"), "title_to_abstract")
    with pytest.raises(ValueError, match="item 'h1': .*title empty"):
        pair("LaMP-4", Item("h1", text="An article"))


def test_pairs_are_deterministic_and_share_the_instruction() -> None:
    config = TaskConfig(name="chat_reply")
    items = [Item(str(i), text=f"reply {i}", context=(f"Partner: line {i}",)) for i in range(5)]
    pairs = make_pairs(get_task(config), items, config)
    assert pairs == make_pairs(get_task(config), items, config)
    assert len({made.prompt.instruction for made in pairs}) == 1
    assert read(pairs[2]) == ("Write the user's next message in this chat.\nPartner: line 2\nYou:", " reply 2")


def forms(name: str, items: list[Item], form: str) -> list[tuple[str, str]]:
    config = TaskConfig(name=name)
    return [read(made) for made in make_pairs(get_task(config), items, config, form)]


def test_a_study_can_treat_aligned_items_as_text() -> None:
    films = [Item(str(i), text=f"robots in love {i}", label="comedy") for i in range(3)]
    assert forms("LaMP-2M", films, "next_token")[1] == ("description:", " robots in love 1 tag: comedy")
    assert forms("LaMP-2M", films, "stem")[1] == ("description: robots in love 1\ntag:", " comedy")
    assert forms("LaMP-2M", films, "completion")[1] == ("description: robots", " in love 1")
    aligned, mixed, plain = (forms("LaMP-2M", films, form) for form in ("aligned", "mixed", "next_token"))
    assert mixed == [aligned[0], plain[1], aligned[2]] and aligned[1] != plain[1]


@pytest.mark.parametrize("form", ["next_token", "stem", "completion", "mixed"])
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_tasks_items_have_every_form(task: Task, form: str) -> None:
    values = {"text": "one two three", "title": "a title", "keywords": "one", "context": ("Partner: hi there",)}
    label = task.labels[0] if task.labels else None
    made = Item("1", label=label, options=("this", "that"), **values)  # type: ignore[arg-type]
    for prompt, completion in forms(task.name, [made, made], form):
        assert prompt and completion.strip()
