from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from talkoot.protocol.errors import ConfigError
from talkoot.protocol.invite import Invite

CA = "0123456789abcdef" * 4
TOKEN = "aVerySecret_token-1"
GOOD = f"https://train.example.org:8443/join#ca={CA}&token={TOKEN}"

labels = st.from_regex(r"[a-z]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
hosts = st.one_of(
    st.lists(labels, min_size=1, max_size=4).map(".".join),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
)
invites = st.builds(
    Invite,
    hosts,
    st.integers(1, 65535),
    st.text("0123456789abcdef", min_size=64, max_size=64),
    st.none() | st.text(string.ascii_letters + string.digits + "-_", min_size=16, max_size=128),
)


def test_a_link_for_everybody_has_no_token_and_half_an_invite_is_not_one() -> None:
    link = f"https://train.example.org:8443/ask#ca={CA}"
    assert Invite.parse(link) == Invite("train.example.org", 8443, CA, None)
    assert Invite.parse(link).url() == link
    with pytest.raises(ConfigError, match="only ca="):
        Invite.parse(f"{link}&token={TOKEN}")


@given(invites)
def test_every_invite_is_read_back_from_its_link(invite: Invite) -> None:
    assert Invite.parse(invite.url()) == invite
    assert Invite.parse(f"  {invite.url()}\n") == invite


def test_the_link_looks_as_documented() -> None:
    assert Invite.parse(GOOD) == Invite("train.example.org", 8443, CA, TOKEN)
    assert Invite.parse(GOOD).url() == GOOD
    assert Invite("::1", 1, CA, TOKEN).base_url == "https://[::1]:1"


def test_the_token_does_not_show_in_the_representation() -> None:
    assert TOKEN not in repr(Invite.parse(GOOD))


@pytest.mark.parametrize(
    ("link", "says"),
    [
        ("", "empty"),
        ("x" * 2000, "longer than"),
        (GOOD.replace("join", "jo in"), "space"),
        (GOOD.replace("train", "trän"), "character"),
        (GOOD.replace("https", "http"), "https://"),
        (GOOD.removeprefix("https://"), "https://"),
        (GOOD.replace("train", "user:pw@train"), "user name"),
        (GOOD.replace("train.example.org", ""), "no host"),
        (GOOD.replace("train", "-train"), "host name"),
        (GOOD.replace("train.example.org", "10.0.0.256"), "host name"),
        (GOOD.replace("train.example.org", "[fe80::1%25eth0]"), "host"),
        (GOOD.replace("train.example.org", "[::1"), "host"),
        (GOOD.replace(":8443", ""), "no port"),
        (GOOD.replace("8443", "0"), "not a port"),
        (GOOD.replace("8443", "65536"), "port"),
        (GOOD.replace("8443", "abc"), "port"),
        (GOOD.replace("/join", ""), "/join"),
        (GOOD.replace("/join", "/join?x=1"), "/join"),
        (GOOD.split("#")[0], "from the # on"),
        (GOOD.split("&")[0], "quote the link"),
        (GOOD.replace(f"ca={CA}&", ""), "ca= is missing"),
        (GOOD.replace(CA, CA[1:]), "64 hexadecimal"),
        (GOOD.replace(CA, "g" * 64), "64 hexadecimal"),
        (GOOD.replace(TOKEN, "short"), "token="),
        (GOOD.replace(TOKEN, TOKEN + "%20"), "token="),
        (GOOD + "&token=" + TOKEN, "twice"),
        (GOOD + "&colour=red", "only ca= and token="),
    ],
)
def test_each_way_to_be_wrong_is_said_in_one_sentence_with_a_way_out(link: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Invite.parse(link)
    assert says in caught.value.sentence
    assert "ask the operator for a new one" in caught.value.sentence
    assert TOKEN not in caught.value.sentence


@given(st.text(max_size=300))
def test_no_text_at_all_does_worse_than_a_config_error(text: str) -> None:
    for link in (text, "https://" + text, GOOD + text, GOOD.replace("train", text)):
        try:
            Invite.parse(link)
        except ConfigError:
            pass
