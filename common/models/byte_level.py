"""The alphabet of byte-level tokenizers: a printable character for each byte."""

from functools import cache


@cache
def byte_symbols() -> tuple[str, ...]:
    """The character that stands for each byte in the vocabulary, as GPT-2 chose them.

    Bytes that are printable in Latin-1 stand for themselves; the rest count up from U+0100.
    """
    symbols: list[str] = []
    next_code = 0x100
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF:
            symbols.append(chr(byte))
        else:
            symbols.append(chr(next_code))
            next_code += 1
    return tuple(symbols)


@cache
def _byte_by_symbol() -> dict[str, int]:
    return {symbol: byte for byte, symbol in enumerate(byte_symbols())}


def symbol_bytes(symbols: str) -> bytes | None:
    """The bytes that ``symbols`` spell; None if some of them stand for no byte."""
    known = _byte_by_symbol()
    if any(symbol not in known for symbol in symbols):
        return None
    return bytes(known[symbol] for symbol in symbols)
