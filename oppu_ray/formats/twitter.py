"""The archive of a Twitter/X account -> its user, whose items are their tweets."""

from __future__ import annotations

import html
import re
from collections import Counter
from pathlib import Path
from typing import Any

from oppu_ray.config import DataConfig
from oppu_ray.formats import exports
from oppu_ray.formats.raw import RawUser, Users
from oppu_ray.tasks import Task
from oppu_ray.words import letters

ASSIGNMENT = r"window\.YTD\.\w+\.part\d+ = "
MIN_KEYWORD_CHARS = 4
MAX_KEYWORDS = 12


def read_twitter(data: DataConfig, task: Task) -> Users:
    """`data/tweets.js` (older: `tweet.js`) and its parts. The user is called as the account, or `data.user_name`.

    Retweets are left out. An item's `keywords`, which the archive has not, are the tweet's longer words, sorted: an
    input without its style.

    Raises:
        ValueError: It is no such archive.
    """
    path = Path(data.path)
    files = exports.find(path, r"tweets?(-part\d+)?\.js", "data/tweets.js, or the folder or archive that holds it")
    counts = Counter[str]()
    history: list[dict[str, Any]] = []
    for file in files.values():
        try:
            for entry in exports.read_json(file, ASSIGNMENT):
                tweet = entry.get("tweet", entry)
                text = tweet.get("full_text") or tweet["text"]
                own = re.sub(r"https://t\.co/\w+", "", html.unescape(text)).strip()
                if text.startswith("RT @"):
                    counts["retweets, which somebody else wrote, are"] += 1
                elif not re.sub(r"@\w+", "", own).strip():
                    counts["tweets without text (links, pictures) are"] += 1
                else:
                    item = {"id": tweet["id_str"], "time": tweet["created_at"], "text": own}
                    history.append({**item, "keywords": keywords_of(own)})
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: not a file of tweets of a Twitter archive: {error!r}") from error
    yield RawUser(str(path), None, {"user_id": data.user_name or _account(path), "history": history})
    yield from exports.left_out(path, counts)


def _account(path: Path) -> str:
    for name, file in exports.files_of(path).items():
        if re.fullmatch(r"(?:.*/)?account\.js", name):
            try:
                return str(exports.read_json(file, ASSIGNMENT)[0]["account"]["username"])
            except (IndexError, KeyError, TypeError):
                break
    return "me"


def keywords_of(text: str) -> str:
    """The longer words of a text without hashtags, names and links, each once, sorted; all words where none is long."""
    bare = re.sub(r"[#@]\w+|https?://\S+", " ", text)
    found = sorted(set(letters(bare)))
    longer = [word for word in found if len(word) >= MIN_KEYWORD_CHARS or not word.isascii()]
    return " ".join((longer or found)[:MAX_KEYWORDS])
