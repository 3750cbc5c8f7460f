"""A value means the same whichever file it comes from, and nothing is guessed."""

from __future__ import annotations

import datetime
import uuid
from decimal import Decimal
from typing import Any

import pytest

from oppu_ray.values import as_text, parse_time


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, None),
        (float("nan"), None),
        (Decimal("NaN"), None),
        ("007", "007"),
        ("NA", "NA"),
        ("", ""),
        (7, "7"),
        (10**30, str(10**30)),
        (4.0, "4"),
        (-4.0, "-4"),
        (4.5, "4.5"),
        (Decimal("4.0"), "4"),
        (Decimal("4.50"), "4.5"),
        (Decimal("1E+2"), "100"),
        (b"caf\xc3\xa9", "café"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (datetime.date(2024, 5, 1), "2024-05-01"),
        (datetime.datetime(2024, 5, 1, 10, 30, tzinfo=datetime.UTC), "2024-05-01T10:30:00+00:00"),
        (datetime.time(10, 30), "10:30:00"),
    ],
)
def test_a_value_has_one_text(value: Any, text: str | None) -> None:
    assert as_text(value) == text


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (True, "true or false"),
        ({"a": 1}, "an object"),
        ([1], "a list"),
        (float("inf"), "an infinite number"),
        (2.0**53, "the float 9007199254740992.0, whose last digits are rounded away"),
        (b"caf\xe9", r"bytes that are not UTF-8 \(0xe9\)"),
        (datetime.timedelta(1), "a value of type timedelta"),
    ],
)
def test_a_value_without_a_text_is_named_by_what_it_is(value: Any, found: str) -> None:
    with pytest.raises(ValueError, match=f"^{found}$"):
        as_text(value)


@pytest.mark.parametrize(
    ("time", "moment"),
    [
        ("2014", "2014-01-01T00:00:00+00:00"),
        ("2014.0", "2014-01-01T00:00:00+00:00"),
        ("2014-5", "2014-05-01T00:00:00+00:00"),
        ("2023-05-14", "2023-05-14T00:00:00+00:00"),
        ("2023/05/14", "2023-05-14T00:00:00+00:00"),
        ("2023.5.4", "2023-05-04T00:00:00+00:00"),
        ("20230514", "2023-05-14T00:00:00+00:00"),
        ("2023/05/14 10:22:33", "2023-05-14T10:22:33+00:00"),
        ("2023-05-14T10:22:33Z", "2023-05-14T10:22:33+00:00"),
        ("2023-05-14 10:22:33.123456789+02:00", "2023-05-14T10:22:33.123456+02:00"),
        ("2023-05-14 10:22:33 UTC", "2023-05-14T10:22:33+00:00"),
        ("978300760", "2000-12-31T22:12:40+00:00"),
        ("978300760.0", "2000-12-31T22:12:40+00:00"),
        ("-978300760", "1939-01-01T01:47:20+00:00"),
        ("1700000000.000100", "2023-11-14T22:13:20.000100+00:00"),
        ("1588687728923", "2020-05-05T14:08:48.923000+00:00"),
        ("1588687728923000", "2020-05-05T14:08:48.923000+00:00"),
        ("1588687728923000000", "2020-05-05T14:08:48.923000+00:00"),
        ("Sun Jul 30 07:44:10 -0700 2017", "2017-07-30T07:44:10-07:00"),
        ("Tue, 14 May 2024 10:00:00 +0200", "2024-05-14T10:00:00+02:00"),
        ("May 14, 2024", "2024-05-14T00:00:00+00:00"),
    ],
)
def test_times_that_mean_one_thing_are_read(time: str, moment: str) -> None:
    assert parse_time(time).isoformat() == moment


@pytest.mark.parametrize(
    ("time", "found"),
    [
        ("05/06/2023", "may begin with the day or with the month"),
        ("5.6.23, 10:00", "may begin with the day or with the month"),
        ("12", "a number of 2 digits"),
        ("9" * 30, "a number of 30 digits"),
        ("-99999999999", "out of range"),
        ("2023-02-30", "day is out of range for month"),
        ("tomorrow", "is not a time that is known"),
        ("", "is not a time that is known"),
    ],
)
def test_a_time_that_could_mean_two_things_or_none_is_named(time: str, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        parse_time(time)


@pytest.mark.parametrize(
    ("time", "time_format", "moment"),
    [
        ("05/06/2023", "%d/%m/%Y", "2023-06-05T00:00:00+00:00"),
        ("09 13, 2009", "%m %d, %Y", "2009-09-13T00:00:00+00:00"),
        ("5", "s", "1970-01-01T00:00:05+00:00"),
        ("1588687728923.5", "ms", "2020-05-05T14:08:48.923500+00:00"),
        ("20230514", "s", "1970-08-23T03:35:14+00:00"),
    ],
)
def test_a_time_format_says_how_to_read(time: str, time_format: str, moment: str) -> None:
    assert parse_time(time, time_format).isoformat() == moment


def test_a_time_that_is_not_as_its_format_says_is_refused() -> None:
    with pytest.raises(ValueError, match="'2023-05-14' does not match format '%d/%m/%Y'"):
        parse_time("2023-05-14", "%d/%m/%Y")
    with pytest.raises(ValueError, match="'May' is not a number, as data.time_format=ms says"):
        parse_time("May", "ms")
