"""A mailbox (mbox, as Thunderbird and Gmail's Takeout write it, or a Maildir) -> users: who wrote its mails."""

from __future__ import annotations

import difflib
import email
import email.policy
import mailbox
import re
from collections import Counter
from collections.abc import Iterator
from email.message import EmailMessage
from email.utils import parseaddr
from pathlib import Path
from typing import IO, Any

from oppu_ray.config import DataConfig
from oppu_ray.formats import exports
from oppu_ray.formats.raw import RawUser, Users
from oppu_ray.tasks import Task

REPLY = re.compile(r"^(?:re|aw|fwd?|wg|sv|tr|rv|antw)\s*(?:\[\d+\])?:", re.IGNORECASE)
QUOTED = re.compile(r"^(?:>|On .+ wrote:$|Am .+ schrieb .*:$|Le .+ a écrit ?:$|-+ ?Original Message ?-+$|-- $)")
"""Where a mail's own text ends: at a quotation, at its introduction, or at the signature."""


def read_mbox(data: DataConfig, task: Task) -> Users:
    """For mail tasks an item is a mail with a subject of its own (`text`, `title`); for chats, a reply with the mail it
    answers (`context`, `text`). `data.user_name` is the address of whom to learn from, or "*" for everybody.

    Raises:
        ValueError: It is no mailbox, or nobody has that address.
    """
    path = Path(data.path)
    mails: dict[str, tuple[str, EmailMessage, str]] = {}
    counts = Counter[str]()
    for number, mail in enumerate(_mails(path), start=1):
        sender = parseaddr(str(mail.get("From", "")))[1].lower()
        text = _own_text(mail)
        if sender and text:
            mails[str(mail.get("Message-ID") or number).strip()] = sender, mail, text
        else:
            counts["mails without plain text of their own are"] += 1
    wanted = data.user_name.lower()
    senders = Counter(sender for sender, _, _ in mails.values())
    if wanted != exports.EVERYONE and wanted not in senders:
        shown = ", ".join(f"{sender} ({num} mails)" for sender, num in senders.most_common(exports.MAX_NAMES_SHOWN))
        near = difflib.get_close_matches(wanted, senders, 1) if wanted else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        found = f"found nobody with the address {wanted!r}" if wanted else "whose mails are to be learnt is not said"
        raise ValueError(f"data.user_name: {path}: {found}; expected one of {shown or 'nobody: no mails'}, or *{hint}")
    histories: dict[str, list[dict[str, Any]]] = {}
    for mail_id, (sender, mail, text) in mails.items():
        item = _reply(mail, text, mails) if "context" in task.fields else _with_subject(mail, text)
        if item is None:
            counts[
                "mails that are not such items are" if wanted == "*" else "mails of others or of another kind are"
            ] += 1
        elif wanted in (exports.EVERYONE, sender):
            time = str(mail["Date"]) if mail["Date"] else None
            histories.setdefault(sender, []).append({"id": mail_id, "time": time, **item})
    for sender, history in histories.items():
        yield RawUser(str(path), None, {"user_id": sender, "history": history})
    yield from exports.left_out(path, counts)


def _mails(path: Path) -> Iterator[EmailMessage]:
    def parse(stream: IO[bytes]) -> EmailMessage:
        return email.message_from_binary_file(stream, policy=email.policy.default)  # type: ignore[return-value]

    factory: Any = parse  # typeshed knows the factories of the standard library only
    is_maildir = (path / "cur").is_dir()
    if not is_maildir and not path.read_bytes()[:5] == b"From ":
        raise ValueError(f"{path}: expected a mailbox (mbox), whose first line begins with 'From ', or a Maildir")
    try:
        box: Any = mailbox.Maildir(path, factory, False) if is_maildir else mailbox.mbox(path, factory, False)
        yield from box
    except (OSError, mailbox.Error) as error:
        raise ValueError(f"{path}: cannot be read as a mailbox: {error}") from error


def _own_text(mail: EmailMessage) -> str:
    """The mail's plain text before quotations and signature; "" where it has none."""
    try:
        body = mail.get_body(("plain",))
        content = str(body.get_content()) if body else ""
    except (LookupError, ValueError, AttributeError, AssertionError):  # an unknown charset, a broken part
        return ""
    lines: list[str] = []
    for line in content.splitlines():
        if QUOTED.match(line):
            break
        lines.append(line)
    return "\n".join(lines).strip()


def _with_subject(mail: EmailMessage, text: str) -> dict[str, Any] | None:
    subject = str(mail.get("Subject", "")).strip()
    return {"text": text, "title": subject} if subject and not REPLY.match(subject) else None


def _reply(mail: EmailMessage, text: str, mails: dict[str, tuple[str, EmailMessage, str]]) -> dict[str, Any] | None:
    answered = mails.get(str(mail.get("In-Reply-To", "")).strip())
    return {"context": [f"Partner: {answered[2]}"], "text": text} if answered else None
