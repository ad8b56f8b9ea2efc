"""What tells who somebody is, masked: e-mail and IP addresses, numbers of credit cards and telephones."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable

MASKS = {"email": "[EMAIL]", "ip": "[IP]", "card": "[CARD]", "phone": "[PHONE]"}

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+%-]{1,64}@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+[^\W\d_]{2,24}(?![\w-])")
_IP4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w]|\.\d)")
_IP6 = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_CARD = re.compile(r"(?<![\w.])\d(?:[ -]?\d){12,18}(?![\w])")
# An international number, or one of North America; other national forms cannot be told from other numbers.
_PHONE = re.compile(
    r"(?<![\w.])\+[1-9](?:[ ().-]{0,2}\d){7,14}(?!\w)|"
    r"(?<![\w.-])(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])[2-9]\d\d[ .-]\d{4}(?![\w-])"
)


def masked(text: str) -> tuple[str, int]:
    """The text with [EMAIL], [IP], [CARD] and [PHONE] in these places, and how many there were.

    An address of the Internet must be one (octets below 256), a card's number must satisfy Luhn's formula. Masking
    twice is masking once.
    """
    total, found = 0, 1
    while found:  # what stood beside a number may be one by itself
        text, found = _masked(text)
        total += found
    return text, total


def _masked(text: str) -> tuple[str, int]:
    total = 0

    def where(mask: str, holds: Callable[[str], bool]) -> Callable[[re.Match[str]], str]:
        def put(found: re.Match[str]) -> str:
            nonlocal total
            total += (here := holds(found[0]))
            return mask if here else found[0]

        return put

    if "@" in text:
        text = _EMAIL.sub(where(MASKS["email"], bool), text)
    text = _IP4.sub(where(MASKS["ip"], _is_ip), text)
    if "::" in text or text.count(":") >= 7:
        text = _IP6.sub(where(MASKS["ip"], _is_ip), text)
    text = _CARD.sub(where(MASKS["card"], luhn), text)
    text = _PHONE.sub(where(MASKS["phone"], bool), text)
    return text, total


def luhn(number: str) -> bool:
    """Whether the digits of a number, separators aside, satisfy Luhn's formula (ISO/IEC 7812-1); not all zeros."""
    digits = [int(c) for c in number if c.isdecimal()]
    doubled = [2 * d - 9 * (d > 4) for d in digits[-2::-2]]
    return any(digits) and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return text != "::"
