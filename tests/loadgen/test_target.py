"""What is sent is checked before the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagescope.errors import UsageError
from stagescope.loadgen.target import target

URL = "http://127.0.0.1:1/x"


@pytest.mark.parametrize(
    "url", ["", "host:80", "ftp://h/", "http://", "http://h:99999/", "http://a b/"]
)
def test_what_is_no_url_is_refused(url: str) -> None:
    """The sentence shows the text and what a URL looks like."""
    with pytest.raises(UsageError, match="is not a URL to load"):
        target(url)


def test_method_follows_the_body() -> None:
    """POST with a body, GET without one, and what the user says otherwise."""
    assert target(URL).method == "GET"
    assert target(URL, json_text="{}").method == "POST"
    assert target(URL, json_text="{}", method="put").method == "PUT"


def test_json_brings_its_content_type_unless_the_user_has_one() -> None:
    """application/json is added once."""
    assert ("Content-Type", "application/json") in target(URL, json_text="1").headers
    own = target(URL, json_text="1", headers=("content-type: application/x",))
    assert own.headers == (("content-type", "application/x"),)


@pytest.mark.parametrize("header", ["none", "a b: c", ": c", "a: b\r\nc: d"])
def test_a_header_that_is_none_is_refused_without_its_value(header: str) -> None:
    """The sentence names the header; values may be secrets."""
    with pytest.raises(UsageError, match="give it as 'Name: value'"):
        target(URL, headers=(header,))


def test_traceparent_belongs_to_the_driver() -> None:
    """A traceparent of the user's own would be the same for every request."""
    with pytest.raises(UsageError, match="fresh for each request"):
        target(URL, headers=("Traceparent: x",))


def test_body_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """The sentence names the file and the cause."""
    with pytest.raises(UsageError, match=r"nofile cannot be read: No such file"):
        target(URL, body=tmp_path / "nofile")
    with pytest.raises(UsageError, match="choose one"):
        target(URL, body=tmp_path / "nofile", json_text="1")


def test_stored_url_has_no_secrets() -> None:
    """User, password and query string stay out of the run folder."""
    shown = target("https://me:pw@h:81/p?token=1").shown_url
    assert shown == "https://h:81/p?..."


def test_baggage_of_the_user_is_kept_beside_the_run() -> None:
    """One baggage header goes out: ours first, the user's members after it, no second run."""
    aim = target(URL, headers=("Baggage: a=1,stagescope.run=old", "baggage: b=2;p", "X-A: 1"))
    headers = aim.headers_for("r1")
    assert headers[0] == ("X-A", "1")
    assert headers[-1] == ("baggage", "stagescope.run=r1,a=1,b=2;p")
    assert [name.lower() for name, _ in headers].count("baggage") == 1
