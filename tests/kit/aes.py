"""AES-128-ECB with PKCS#7, as FIPS 197 describes it step by step: slow, and only one way."""

from __future__ import annotations


def times(one: int, other: int) -> int:
    """Section 4.2."""
    product = 0
    for bit in range(8):
        if other >> bit & 1:
            product ^= one << bit
    for bit in range(14, 7, -1):
        if product >> bit & 1:
            product ^= 0x11B << bit - 8
    return product


def substitute(byte: int) -> int:
    """Section 5.1.1."""
    inverse = next((each for each in range(256) if times(byte, each) == 1), 0)
    result = 0
    for bit in range(8):
        taken = sum(inverse >> (bit + step) % 8 & 1 for step in (0, 4, 5, 6, 7))
        result |= (taken + (0x63 >> bit)) % 2 << bit
    return result


BOX = [substitute(byte) for byte in range(256)]


def round_keys(key: bytes) -> list[list[int]]:
    """Section 5.2."""
    words, constant = [list(key[place:place + 4]) for place in (0, 4, 8, 12)], 1
    for place in range(4, 44):
        word = words[-1]
        if place % 4 == 0:
            word = [BOX[byte] for byte in word[1:] + word[:1]]
            word[0] ^= constant
            constant = times(constant, 2)
        words.append([a ^ b for a, b in zip(words[place - 4], word)])
    return [sum(words[place:place + 4], []) for place in range(0, 44, 4)]


def encrypt_block(block: bytes, keys: list[list[int]]) -> bytes:
    """Section 5.1; the state is kept column by column."""
    state = [a ^ b for a, b in zip(block, keys[0])]
    for number in range(1, 11):
        state = [BOX[byte] for byte in state]
        state = [state[(place + 4 * (place % 4)) % 16] for place in range(16)]
        if number < 10:
            state = [
                times(column[row], 2) ^ times(column[(row + 1) % 4], 3) ^ column[(row + 2) % 4]
                ^ column[(row + 3) % 4]
                for column in (state[place:place + 4] for place in (0, 4, 8, 12))
                for row in range(4)]
        state = [a ^ b for a, b in zip(state, keys[number])]
    return bytes(state)


def encrypted(data: bytes, key: bytes) -> bytes:
    """The whole of it."""
    keys, padding = round_keys(key), 16 - len(data) % 16
    data += bytes([padding]) * padding
    return b"".join(encrypt_block(data[place:place + 16], keys)
                    for place in range(0, len(data), 16))
