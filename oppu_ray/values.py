"""A value of a source -> text, and a time -> a moment: the same for JSONL, CSV, Parquet and Hugging Face datasets.

Design: nothing is guessed. `007` and `7` stay two ids, `NA` stays a text, and a value that could mean two things
(`05/06/2023`, a rounded float) is refused with what was found.
"""

from __future__ import annotations

import datetime
import decimal
import email.utils
import math
import re
import uuid

NUMBER = re.compile(r"(-?)(\d+)(?:\.(\d*))?")
DAY = re.compile(r"(\d{4})(?:\.0*|[-/](\d{1,2})(?:[-/](\d{1,2}))?|\.(\d{1,2})\.(\d{1,2}))?")
UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
"""Names of `data.time_format` for numbers since 1970, and how many make a second."""
OTHER_TIMES = (
    "%a %b %d %H:%M:%S %z %Y",  # Twitter, Goodreads: Sat May 14 10:22:33 -0700 2011
    "%a %b %d %H:%M:%S %Y",  # C's asctime
    "%B %d, %Y",
    "%b %d, %Y",
    "%d %B %Y",
    "%d %b %Y",
)
EXACT_FLOAT = 2**53


def as_text(value: object) -> str | None:
    """The text of a value: 4, 4.0 and Decimal("4.0") are "4", bytes are UTF-8; None for null and NaN.

    Raises:
        ValueError: It has no text of its own (a list, a truth value ...); the message says what it is.
    """
    match value:
        case None | str():
            return value
        case bool():
            pass
        case int() | uuid.UUID():
            return str(value)
        case float() | decimal.Decimal():
            return _number_text(value)
        case datetime.date() | datetime.time():  # a datetime is a date
            return value.isoformat()
        case bytes():
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"bytes that are not UTF-8 (0x{value[error.start]:02x})") from None
    raise ValueError(kind_of(value))


def _number_text(value: float | decimal.Decimal) -> str | None:
    if math.isnan(value):
        return None
    if math.isinf(value):
        raise ValueError("an infinite number")
    if value != int(value):
        return repr(value) if isinstance(value, float) else format(value.normalize(), "f")
    if isinstance(value, float) and abs(value) >= EXACT_FLOAT:
        raise ValueError(f"the float {value!r}, whose last digits are rounded away")
    return str(int(value))


def kind_of(value: object) -> str:
    """What a value is, in words: "an object", "a list", "a number" ..."""
    names = {dict: "an object", list: "a list", tuple: "a list", str: "a text", bool: "true or false"}
    if value is None:
        return "nothing"
    is_number = isinstance(value, int | float | decimal.Decimal) and not isinstance(value, bool)
    return names.get(type(value), "a number" if is_number else f"a value of type {type(value).__name__}")


def parse_time(time: str, time_format: str = "") -> datetime.datetime:
    """The moment of a time, in UTC where no zone is given.

    Args:
        time: A year, a day (2023-05-14, 2023/05/14, 20230514), an ISO 8601 time, an e-mail's or Twitter's date, or Unix
            time in seconds, milliseconds, microseconds or nanoseconds, told apart by the number of digits.
        time_format: How to read it instead: as in `strptime`, or one of `UNITS` for numbers since 1970.

    Raises:
        ValueError: It is none of these; the message says what was found.
    """
    try:
        moment = _parse_as(time, time_format) if time_format else _parse_any(time)
    except (OverflowError, ValueError) as error:
        raise ValueError(str(error) if repr(time) in str(error) else f"{time!r}: {error}") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)


def _parse_as(time: str, time_format: str) -> datetime.datetime:
    if time_format not in UNITS:
        return datetime.datetime.strptime(time, time_format)
    if not NUMBER.fullmatch(time):
        raise ValueError(f"{time!r} is not a number, as data.time_format={time_format} says")
    return _since_1970(decimal.Decimal(time) / UNITS[time_format])


def _parse_any(time: str) -> datetime.datetime:
    if parts := DAY.fullmatch(time):
        year, month, day = [*(int(part) for part in parts.groups() if part), 1, 1][:3]
        return datetime.datetime(year, month, day)
    if parts := NUMBER.fullmatch(time):
        return _number_time(time, len(parts[2]), bool(parts[3]))
    if re.match(r"\d{4}/\d\d/\d\d[T ]", time):
        time = time.replace("/", "-", 2)
    try:
        return datetime.datetime.fromisoformat(re.sub(r" ?(UTC|GMT)$", "+00:00", time))
    except ValueError:
        pass
    for known in OTHER_TIMES:
        try:
            return datetime.datetime.strptime(time, known)
        except ValueError:
            pass
    if re.match(r"\d{1,2}[/.-]\d{1,2}[/.-]\d{2}", time):
        raise ValueError(f"{time!r} may begin with the day or with the month")
    try:
        return email.utils.parsedate_to_datetime(time)
    except ValueError:
        raise ValueError(f"{time!r} is not a time that is known") from None


def _number_time(time: str, num_digits: int, has_fraction: bool) -> datetime.datetime:
    """A number of 9 to 11 digits counts seconds, three digits more are milliseconds, and so on."""
    if num_digits == 8 and not has_fraction:
        return datetime.datetime.fromisoformat(time)
    if not 9 <= num_digits <= 20:
        raise ValueError(f"{time!r} is a number of {num_digits} digits, too few or too many for Unix time")
    return _since_1970(decimal.Decimal(time) / 10 ** (3 * ((num_digits - 9) // 3)))


def _since_1970(seconds: decimal.Decimal) -> datetime.datetime:
    whole, fraction = divmod(seconds, 1)
    start = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return start + datetime.timedelta(seconds=int(whole), microseconds=int(fraction * 10**6))
