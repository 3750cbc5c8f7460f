"""The page in a real browser, on a backend without an engine: every button once, hostile text, no outside resources."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import uvicorn
from browser import Browser, browser
from serve_tools import CONFIG, FakeBackend, token_of
from vault_tools import make_adapter, make_manifest

from oppu_ray.core import Item
from oppu_ray.vault import Vault
from serve.messages import Refresh
from serve.web import create_web

HOSTILE = "<img src=x onerror=\"document.title='owned'\"> {{7*7}} & <script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeBackend, str]]:
    """A backend and the address where a real server has it."""
    vault = Vault(tmp_path_factory.mktemp("page") / "vault")
    vault.add_users(["ann"])
    backend = FakeBackend(vault)
    config = replace(CONFIG, serve=replace(CONFIG.serve, requests_per_user=8))  # the page asks three things at once
    app = create_web(backend, config, lambda route, status: None)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield backend, f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    with browser() as one:
        yield one


def sign_in(tab: Browser, url: str, token: str) -> None:
    """With the keyboard alone: the token field is where Tab leads first."""
    tab.open(url)
    tab.key("Tab", 9)
    assert tab.run("document.activeElement.id") == "token"
    type_token(tab, token)


def type_token(tab: Browser, token: str) -> None:
    tab.run("document.querySelector('#token').focus()")
    tab.send("Input.insertText", text=token)
    tab.key("Enter", 13)


def status(tab: Browser) -> str:
    return tab.text("#status")


def test_a_wrong_token_says_so(service: tuple[FakeBackend, str], tab: Browser) -> None:
    sign_in(tab, service[1], "oppu_wrong")
    tab.until("document.querySelector('#status').classList.contains('bad')")
    assert "valid token" in status(tab) and tab.run("document.querySelector('#desk').hidden")


def test_all_that_a_user_can_do(service: tuple[FakeBackend, str], tab: Browser, tmp_path: Path) -> None:
    backend, url = service
    vault = backend.vault
    for seed in (1, 2):
        vault.commit("ann", make_adapter(seed), make_manifest())
    vault.append_history("ann", [Item("old", text=HOSTILE, label="comedy")])
    backend.text = f"answer {HOSTILE}"
    sign_in(tab, url, token_of(vault, "ann"))
    tab.until("!document.querySelector('#desk').hidden")
    tab.log.clear()
    assert tab.run("document.activeElement.id") == "ask-text", "the focus is where one goes on"

    tab.fill("#ask-text", HOSTILE)
    tab.fill("#top-k", "2")
    tab.click("#ask button[type=submit]")
    tab.until("document.querySelector('#status').innerText === 'Three answers.'")
    asked = {(ask.use_adapter, ask.top_k) for ask in backend.asked}
    assert asked == {(False, 0), (False, 2), (True, 0)}
    assert "answer <img" in tab.text("#answer-oppu") and "000002-" in tab.text("#answer-oppu")
    assert "a film" in tab.text("#answer-rag") and "no adapter" in tab.text("#answer-task")
    tab.picture(tmp_path / "page.png")

    tab.fill("#append-text", "a new film")
    tab.fill("#append-label", "action")
    tab.click("#append button[type=submit]")
    tab.until("document.querySelector('#num-items').innerText.startsWith('2 items')")
    assert tab.text("#items li").startswith("a new film · action")

    tab.click("#rollback")
    tab.until("document.querySelector('#versions').innerText.includes('current') && "
              "document.querySelectorAll('#versions tr')[1].innerText.includes('current')")  # fmt: skip
    tab.until("document.querySelector('#rollback').disabled")

    backend.refreshes = [Refresh("queued"), Refresh("training", 3, 9), Refresh("done", 9, 9, "000009-9")]
    tab.click("#refresh")
    tab.until("document.querySelector('#progress-label').innerText === 'Training: step 3 of 9'")
    assert tab.run("document.querySelector('#progress').value") == 3
    tab.until("document.querySelector('#status').innerText.includes('Version 000009-9 answers')")

    tab.click("#items li:last-child button")
    tab.until("document.querySelector('#num-items').innerText.startsWith('1 item')")
    assert [item.text for item in vault.read_history("ann")] == ["a new film"]

    tab.run("{ const make = URL.createObjectURL; "
            "URL.createObjectURL = (made) => { window.exported = made.size; return make(made); } }")  # fmt: skip
    tab.click("#export")
    tab.until("document.querySelector('#status').innerText === 'Exported.'")
    assert tab.run("window.exported") > 100

    tab.click("#forget")
    tab.key("Escape", 27)
    tab.until("!document.querySelector('#sure').open")
    assert vault.registry.has_user(vault.user_hash("ann"))
    tab.click("#forget")
    tab.click("#sure button[value=yes]")
    tab.until("document.querySelector('#status').innerText.startsWith('Forgotten. Receipt')")
    assert not vault.registry.has_user(vault.user_hash("ann"))
    assert tab.run("document.querySelector('#desk').hidden && document.activeElement.id === 'token'")
    errors = [line for line in tab.log if "Failed to load resource" not in line]  # the page shows what was refused
    assert tab.run("document.title") == "Your personal model" and not errors, errors


def test_a_training_is_watched_from_signing_in_until_signing_out(
    service: tuple[FakeBackend, str], tab: Browser
) -> None:
    backend, url = service
    backend.vault.add_users(["eve"])
    token = token_of(backend.vault, "eve")
    under_way, done = Refresh("training", 3, 9), Refresh("done", 9, 9, "000009-9")
    backend.refreshes = [under_way, under_way, done]
    sign_in(tab, url, token)
    tab.until("document.querySelector('#status').innerText.includes('Version 000009-9 answers')")
    assert not tab.run("document.querySelector('#refresh').disabled")

    backend.refreshes = [under_way]
    tab.open(url)
    tab.run("window.setTimeout = (poll) => { window.poll = poll; }; 0")
    type_token(tab, token)
    tab.until("window.poll && !document.querySelector('#desk').hidden")
    tab.click("#sign-out")
    tab.run("window.fetch = async () => { throw new Error('asked by nobody'); }; window.poll(); 0")
    assert status(tab) == "Signed out." and not tab.run("document.querySelector('#refresh').disabled")
    backend.refreshes = [Refresh()]


def test_the_receipt_is_shown_though_a_poll_is_refused_before_it_comes(
    service: tuple[FakeBackend, str], tab: Browser
) -> None:
    backend, url = service
    backend.vault.add_users(["eve"])
    backend.refreshes = [Refresh("training", 3, 9)]
    tab.open(url)
    tab.run("window.setTimeout = (poll) => { window.poll = poll; }; 0")
    type_token(tab, token_of(backend.vault, "eve"))
    tab.until("window.poll && !document.querySelector('#desk').hidden")
    tab.run("{ const real = window.fetch; window.fetch = async (path, options) => { const answer = await real(path, "
            "options); if (options.method === 'DELETE') await new Promise((go) => { window.go = go; }); "
            "return answer; } }")  # fmt: skip
    tab.click("#forget")
    tab.click("#sure button[value=yes]")
    tab.until("!!window.go")
    tab.run("window.poll(); 0")
    tab.until("document.querySelector('#desk').hidden")
    tab.run("window.go(); 0")
    tab.until("document.querySelector('#status').innerText.startsWith('Forgotten. Receipt')")
    backend.refreshes = [Refresh()]


def test_an_answer_that_comes_late_is_not_shown_to_the_next_user(
    service: tuple[FakeBackend, str], tab: Browser
) -> None:
    backend, url = service
    backend.vault.add_users(["eve", "bob"])
    sign_in(tab, url, token_of(backend.vault, "eve"))
    tab.until("!document.querySelector('#desk').hidden")
    tab.run("{ const real = window.fetch; window.late = []; window.fetch = (path, options) => path.endsWith('ize') "
            "? new Promise((go) => window.late.push(go)) : real(path, options); }")  # fmt: skip
    tab.fill("#ask-text", "the canary of eve")
    tab.click("#ask button[type=submit]")
    tab.until("window.late.length === 3")
    tab.click("#sign-out")
    type_token(tab, token_of(backend.vault, "bob"))
    tab.until("!document.querySelector('#desk').hidden")
    assert tab.run("document.querySelector('#ask-text').value") == ""
    answer = "{answer: 'for eve', timings: {total_s: 1}, items: []}"
    tab.run(f"window.late.forEach((go) => go(new Response(JSON.stringify({answer}))))")
    tab.until("!document.querySelector('#ask button[type=submit]').disabled")
    assert "of eve" not in tab.run("document.body.textContent") and status(tab) == "Signed in."
    assert tab.run("document.querySelector('#answer-oppu').textContent") == ""


def test_a_button_keeps_the_keyboards_focus(service: tuple[FakeBackend, str], tab: Browser) -> None:
    backend, url = service
    backend.vault.add_users(["eve"])
    sign_in(tab, url, token_of(backend.vault, "eve"))
    tab.until("!document.querySelector('#desk').hidden")
    tab.run("document.querySelector('#export').focus()")
    tab.key("Enter", 13)
    tab.until("document.querySelector('#status').innerText === 'Exported.'")
    tab.until("!document.querySelector('#export').disabled")
    assert tab.run("document.activeElement.id") == "export"


def test_nothing_comes_from_outside_and_the_policy_holds(service: tuple[FakeBackend, str], tab: Browser) -> None:
    tab.open(service[1])
    origins = tab.run("[...new Set(performance.getEntriesByType('resource').map((one) => new URL(one.name).origin))]")
    assert origins == [service[1]]
    tab.log.clear()
    tab.run("document.body.appendChild(Object.assign(document.createElement('script'), {textContent: 'owned = 1'}))")
    assert tab.run("typeof owned") == "undefined"
    labelled = "[...document.querySelectorAll('input, textarea, select, progress')].every((one) => one.labels.length)"
    assert tab.run(labelled) and tab.run("document.documentElement.lang") == "en"
    for name in ("index.html", "page.js"):
        source = (Path(__file__).resolve().parents[1] / "serve" / "static" / name).read_text()
        assert "innerHTML" not in source and "style=" not in source and "onclick" not in source


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(service: tuple[FakeBackend, str], tab: Browser, scheme: str) -> None:
    tab.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    tab.open(service[1])
    names = ["--ink", "--soft", "--accent", "--danger", "--paper", "--panel", "--accent-ink", "--line"]
    read = f"{names}.map((name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim())"
    colours = dict(zip(names, tab.run(read), strict=True))
    pairs = [
        (name, ground) for name in ("--ink", "--soft", "--accent", "--danger") for ground in ("--paper", "--panel")
    ]
    for text, ground in [*pairs, ("--accent-ink", "--accent")]:
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert contrast(colours["--line"], colours["--paper"]) >= 3


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio of two "#rrggbb" colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)
