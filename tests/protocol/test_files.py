"""What the operating system refuses, told to people."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from talkoot.protocol.files import explain_os_error


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (errno.ENOSPC, "disk-full", "is full while saving: free some space"),
        (errno.EROFS, "read-only", "Cannot write /srv/talkoot while saving: it is read-only"),
        (errno.EACCES, "read-only", "may not use /srv/talkoot while saving: run this as the user"),
        (errno.EIO, "io", "error at /srv/talkoot while saving: Input/output error."),
    ],
)
def test_what_the_system_refuses_is_told_with_the_place_and_the_way_out(
    number: int, code: str, words: str
) -> None:
    err = OSError(number, "Input/output error")
    told = explain_os_error(err, "saving", Path("/srv/talkoot"))
    assert told.code == code
    assert words in told.sentence
    assert " while" not in explain_os_error(err, "", Path("/srv/talkoot")).sentence
