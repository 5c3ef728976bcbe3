"""Webhooks: where they may go, what they say, and how long they are tried."""

import base64

import pytest

from common.webhooks import (
    GIVE_UP_S,
    Delivery,
    Endpoint,
    event_id,
    is_public,
    target_of,
)
from workers.background.webhooks import MAX_RETRY_S, retry_s

PEPPER = b"p" * 64


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://example.com/", "https://"),
        ("ftp://example.com/", "https://"),
        ("file:///etc/passwd", "https://"),
        ("https://user:secret@example.com/", "user"),
        ("https://@example.com/", "user"),
        ("https://example.com\\@127.0.0.1/", "printable"),
        ("https://example.com/ x", "printable"),
        ("https://ex\u00e4mple.com/", "printable"),
        ("https://example.com/\r\nhost: other", "printable"),
        ("https://example.com/#a", "fragment"),
        ("https://example.com#", "fragment"),
        ("https:///path", "host"),
        ("https://2130706433/", "host"),
        ("https://127.1/", "host"),
        ("https://0177.0.0.1/", "host"),
        ("https://0x7f.1/", "host"),
        ("https://1.2.3.0x7f/", "host"),
        ("https://example..com/", "host"),
        ("https://[fe80::1%25eth0]/", "host"),
        ("https://[::1", "no URL"),
        ("https://example.com:99999/", "no URL"),
        ("https://example.com:22/", "port"),
        ("https://example.com:80/", "port"),
        ("https://example.com:0/", "port"),
        ("https://127.0.0.1/", "public"),
        ("https://[::ffff:10.0.0.1]/", "public"),
        ("https://169.254.169.254/latest/meta-data", "public"),
        (f"https://example.com/{'x' * 2048}", "printable"),
    ],
)
def test_a_url_that_nothing_is_sent_to(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        target_of(url, allow_private=False)


def test_a_url_is_taken_apart_once() -> None:
    target = target_of("https://Hooks.Example.com:8443/a/b?c=d&e", allow_private=False)
    assert (target.host, target.port, target.path) == ("hooks.example.com", 8443, "/a/b?c=d&e")
    assert target.authority == "hooks.example.com:8443"
    assert target_of("https://example.com", allow_private=False).path == "/"
    assert target_of("https://[2606:4700::1111]/", allow_private=False).authority == (
        "[2606:4700::1111]"
    )
    assert target_of("http://127.0.0.1:9000/", allow_private=True).authority == "127.0.0.1:9000"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.216.34", True),
        ("2606:4700::1111", True),
        ("64:ff9b::5db8:d822", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),  # noqa: S104
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("240.0.0.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("2001:0:53aa:64c:0:0:0:0", False),
        ("2001:db8::1", False),
    ],
)
def test_only_addresses_that_all_the_internet_knows_are_public(
    address: str, *, expected: bool
) -> None:
    assert is_public(address) is expected


def endpoint(**changes: object) -> Endpoint:
    fields = {
        "id": "we_1",
        "tenant": "a",
        "url": "https://example.com",
        "created_s": 0,
        "salt": "s2",
        "pepper": b"f",
    }
    return Endpoint(**(fields | changes))  # pyright: ignore[reportArgumentType]


def test_a_secret_hangs_on_pepper_endpoint_and_salt() -> None:
    [secret] = endpoint().secrets(PEPPER, 100)
    assert len(base64.b64decode(secret.removeprefix("whsec_"))) == 32
    others = (
        endpoint(salt="s3").secrets(PEPPER, 100),
        endpoint(id="we_2").secrets(PEPPER, 100),
        endpoint().secrets(b"q" * 64, 100),
    )
    assert len({secret, *(other for [other] in others)}) == 4


def test_the_secret_before_signs_until_its_time_is_over() -> None:
    rotated = endpoint(old_salt="s1", old_until_s=200)
    before = endpoint(salt="s1").secrets(PEPPER, 0)
    assert rotated.secrets(PEPPER, 199) == [*endpoint().secrets(PEPPER, 0), *before]
    assert rotated.secrets(PEPPER, 200) == endpoint().secrets(PEPPER, 0)


def test_an_event_has_one_id_and_one_body() -> None:
    assert event_id("batch.completed", "batch_1") == event_id("batch.completed", "batch_1")
    assert event_id("batch.completed", "batch_1") != event_id("batch.failed", "batch_1")
    delivery = Delivery(
        event_id="evt_1",
        event_type="batch.completed",
        object_id="batch_1",
        tenant="a",
        endpoint_id="we_1",
        created_s=12,
        give_up_s=100,
        attempts=3,
    )
    assert delivery.body() == (
        b'{"id":"evt_1","object":"event","created_at":12,"type":"batch.completed",'
        b'"data":{"id":"batch_1"}}'
    )


def test_it_is_tried_soon_at_first_and_for_days() -> None:
    """Some fifteen times in 72 hours, never more than about eight hours apart."""
    assert 3 < retry_s(1) < 7
    times = [sum(retry_s(n) for n in range(1, attempts)) for attempts in range(2, 40)]
    tried = sum(at < GIVE_UP_S for at in times)
    assert 10 <= tried <= 25
    assert all(retry_s(n) <= 1.25 * MAX_RETRY_S for n in (7, 20, 10_000))
