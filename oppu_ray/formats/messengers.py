"""Exports of messengers -> users: WhatsApp, Telegram and Slack. `data.user_name` says who of a chat is the user."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from oppu_ray.config import DataConfig
from oppu_ray.formats import exports
from oppu_ray.formats.chats import Turn
from oppu_ray.formats.raw import Users
from oppu_ray.tasks import Task

# --- WhatsApp

WHATSAPP_LINE = re.compile(
    r"\[?(?P<date>\d{1,4}[./-]\d{1,2}[./-]\d{1,4}),? (?:\w+ )?"
    r"(?P<hour>\d{1,2})[:.](?P<minute>\d\d)(?:[:.](?P<second>\d\d))?(?: ?(?P<half>[aApP])\.? ?[mM]\.?)?"
    r"(?:\]| -| \u2013) (?P<rest>.*)",
    re.DOTALL,
)
"""[14/05/2023, 10:22:33] Ann: text (iOS), or 14/05/2023, 10:22 - Ann: text (Android), in the order of the locale."""

MARK = "\u200e"
"""WhatsApp puts it before what it wrote itself: "image omitted", "You deleted this message"."""


def read_whatsapp(data: DataConfig, task: Task) -> Users:
    """`_chat.txt` or `WhatsApp Chat with ....txt`, each a chat.

    Raises:
        ValueError: There is no message, `data.user_name` names nobody, or dates may begin with the day or the month.
    """
    path = Path(data.path)
    files = exports.find(path, r".*\.txt", "a chat's .txt file, or the archive that holds it")
    lines = [(name, _whatsapp_messages(exports.read_bytes(file))) for name, file in files.items()]
    dates = [match["date"] for _, messages in lines for match in messages]
    if not dates:
        raise ValueError(f"{path}: expected lines such as '[14/05/2023, 10:22:33] Ann: text'; found none")
    order = _date_order(dates, data.time_format, path)
    counts = Counter[str]()
    chats = [list(_whatsapp_turns(name, messages, order, counts)) for name, messages in lines]
    yield from exports.chat_users(path, data, chats)
    yield from exports.left_out(path, counts)


def _whatsapp_messages(content: bytes) -> list[re.Match[str]]:
    """One match for each message; lines that begin with no date go on with the message before them."""
    text = content.decode("utf-8-sig", "surrogateescape").replace("\u202f", " ").replace("\u00a0", " ")
    messages: list[str] = []
    for line in text.splitlines():
        if WHATSAPP_LINE.match(line.lstrip(MARK + "\u200f")):
            messages.append(line.lstrip(MARK + "\u200f"))
        elif messages:
            messages[-1] += f"\n{line}"
    return [match for message in messages if (match := WHATSAPP_LINE.match(message))]


def _whatsapp_turns(name: str, messages: list[re.Match[str]], order: str, counts: Counter[str]) -> Iterator[Turn]:
    for number, match in enumerate(messages, start=1):
        speaker, colon, text = match["rest"].partition(": ")
        if not colon:
            counts["notices of the app are"] += 1
        elif MARK in text or re.fullmatch(r"<[^<>]+>|null", text.strip()):
            counts["messages without text (pictures, calls, deleted ones) are"] += 1
        else:
            yield Turn(f"{name}-{number}", speaker.strip(f" ~{MARK}\u202a\u202c"), text, _whatsapp_time(match, order))


def _whatsapp_time(match: re.Match[str], order: str) -> str:
    parts = dict(zip(order, map(int, re.split(r"[./-]", match["date"])), strict=True))
    year = parts["y"] + 2000 * (parts["y"] < 100)
    hour = int(match["hour"])
    if match["half"]:
        hour = hour % 12 + 12 * (match["half"] in "pP")
    return f"{year:04d}-{parts['m']:02d}-{parts['d']:02d}T{hour:02d}:{match['minute']}:{match['second'] or '00'}"


def _date_order(dates: list[str], time_format: str, path: Path) -> str:
    """The order of day, month and year: as `time_format` has it, or as some date of the export shows."""
    if time_format:
        return "".join(letter.lower() for letter in re.findall(r"%([dmyY])", time_format))
    split = [re.split(r"[./-]", date) for date in dates]
    if all(len(parts[0]) == 4 for parts in split):
        return "ymd"
    is_day_first = any(int(parts[0]) > 12 for parts in split)
    is_month_first = any(int(parts[1]) > 12 for parts in split)
    if is_day_first == is_month_first:
        raise ValueError(
            f"{path}: {dates[0]!r} may begin with the day or with the month, and no date of the export shows which; "
            "expected data.time_format=%d/%m/%Y or %m/%d/%Y"
        )
    return "dmy" if is_day_first else "mdy"


# --- Telegram


def read_telegram(data: DataConfig, task: Task) -> Users:
    """`result.json` of Telegram Desktop, of one chat or of all.

    Raises:
        ValueError: It is no such file, or `data.user_name` names nobody or two people.
    """
    path = Path(data.path)
    names: dict[str, str] = {}
    counts = Counter[str]()
    chats: list[list[Turn]] = []
    for file in exports.find(path, r"result\.json", "result.json, or the folder or archive that holds it").values():
        content = exports.read_json(file)
        try:
            found = content["chats"]["list"] if "chats" in content else [content]
            chats += [list(_telegram_turns(chat, names, counts)) for chat in found]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: not an export of Telegram Desktop as JSON: {error!r}") from error
    yield from exports.chat_users(path, data, chats, names)
    yield from exports.left_out(path, counts)


def _telegram_turns(chat: dict[str, Any], names: dict[str, str], counts: Counter[str]) -> Iterator[Turn]:
    for message in chat["messages"]:
        parts = message.get("text") or ""
        text = (
            parts
            if isinstance(parts, str)
            else "".join(part if isinstance(part, str) else part["text"] for part in parts)
        )
        if message["type"] != "message" or not text.strip():
            counts["messages without text (pictures, calls, notices) are"] += 1
        elif "forwarded_from" in message:
            counts["forwarded messages, which somebody else wrote, are"] += 1
        else:
            speaker = str(message.get("from_id") or message.get("from"))
            names[speaker] = str(message.get("from") or speaker)
            yield Turn(
                f"{chat.get('id')}-{message['id']}", speaker, text, message.get("date_unixtime") or message["date"]
            )


# --- Slack


def read_slack(data: DataConfig, task: Task) -> Users:
    """A workspace's export: `users.json`, and a folder for each channel with a file for each day.

    A thread is a conversation of its own.

    Raises:
        ValueError: It is no such export, or `data.user_name` names nobody or two people.
    """
    path = Path(data.path)
    files = exports.files_of(path)
    names = _slack_names(exports.find(path, r"users\.json", "the export's folder or archive, with users.json"))
    counts = Counter[str]()
    conversations: dict[str, list[Turn]] = {}
    for name, file in files.items():
        channel, _, day = name.rpartition("/")
        if re.fullmatch(r"\d{4}-\d\d-\d\d\.json", day):
            messages = exports.read_json(file)
            try:
                for message in messages:
                    _add_slack(message, channel, names, conversations, counts)
            except (AttributeError, KeyError, TypeError) as error:
                raise ValueError(f"{file}: not a day of a Slack export: {error!r}") from error
    chats = [sorted(turns, key=lambda turn: float(turn.time)) for turns in conversations.values()]
    yield from exports.chat_users(path, data, chats, names)
    yield from exports.left_out(path, counts)


def _slack_names(files: dict[str, Any]) -> dict[str, str]:
    names: dict[str, str] = {}
    for file in files.values():
        for user in exports.read_json(file):
            profile = user.get("profile") or {}
            shown = (profile.get("display_name"), user.get("real_name"), profile.get("real_name"), user.get("name"))
            names[user["id"]] = next(filter(None, shown), user["id"])
    return names


def _add_slack(
    message: dict[str, Any],
    channel: str,
    names: dict[str, str],
    conversations: dict[str, list[Turn]],
    counts: Counter[str],
) -> None:
    text = message.get("text") or ""
    is_said = message.get("subtype") in (None, "thread_broadcast", "me_message") and not message.get("bot_id")
    if not (is_said and text.strip() and message.get("user")):
        counts["messages of bots, notices and files without text are"] += 1
        return
    text = re.sub(r"<@([A-Z0-9]+)(?:\|[^>]*)?>", lambda found: f"@{names.get(found[1], found[1])}", text)
    text = re.sub(
        r"<[#!][^|>]*\|([^>]+)>|<(?:https?|mailto):[^|>]+\|([^>]+)>", lambda found: found[1] or found[2], text
    )
    text = html.unescape(re.sub(r"<((?:https?|mailto):[^>]+)>", r"\1", text))
    thread = message.get("thread_ts")
    conversation = f"{channel}/{thread}" if thread else channel
    turn = Turn(f"{channel}-{message['ts']}", message["user"], text, message["ts"])
    conversations.setdefault(conversation, []).append(turn)
