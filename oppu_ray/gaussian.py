"""The discrete Gaussian distribution, drawn exactly, from a secret key (what `privacy` adds to sums on a grid).

In: a key, how many numbers, a whole number sigma. Out: whole numbers k, each with a probability proportional to
exp(-k**2 / (2 sigma**2)) (Canonne, Kamath and Steinke 2020, arXiv 2004.00010). Times the step of a grid they are noise
whose bits do not betray what it was added to, as the gaps between floating-point Gaussians do (Mironov 2012).

Design: k = +-(U + sigma V) is proposed with U uniform below sigma and P(V) = 2**-(V + 1), and accepted with probability
2**(V - 1) exp((1 - (U / sigma + V)**2) / 2), half of the time. Proposals are whole-number arithmetic. Acceptance is
decided in float64, with another 128 bits and decimals where it is closer than float64 can tell (once in 10**12
proposals), so that a wrong decision has a probability of 2**-128. The same key gives the same numbers: a
run that is resumed must repeat its noise. That rules OpenDP out, which draws from the system and was measured at 33,000
numbers a second; this draws millions. diffprivlib's sampler is a Python loop for one number.
"""

from __future__ import annotations

from decimal import Decimal, localcontext

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from oppu_ray.secure import derive

PROPOSALS = 2**14  # at a time: they stay in a core's cache
CLOSE = 2.0**-40  # float64 computes an acceptance to better than 2**-45
MAX_SIGMA = 2**40


def discrete_gaussian(key: bytes, num: int, sigma: int) -> np.ndarray:
    """Draw [num] int64 from the discrete Gaussian.

    Args:
        key: 32 secret bytes, used for nothing else; the same key gives the same numbers.
        sigma: From 1 to `MAX_SIGMA`.

    Raises:
        ValueError: Sigma is outside of that.
    """
    if not 1 <= sigma <= MAX_SIGMA:
        raise ValueError(f"sigma is {sigma}; expected a whole number from 1 to {MAX_SIGMA}")
    cipher = Cipher(ChaCha20(key, bytes(16)), None).encryptor()
    parts, num_drawn, num_proposed = [np.zeros(0, np.int64)], 0, 0
    limit = 2**63 // sigma * sigma
    while num_drawn < num:
        words = np.frombuffer(cipher.update(bytes(24 * PROPOSALS)), np.uint64).reshape(3, PROPOSALS)
        place, coins = words[0] >> np.uint64(1), words[2]
        u = (place % np.uint64(sigma)).astype(np.int64)
        # A word's trailing zeros: n of them with probability 2**-(n + 1). With 64, nothing is accepted.
        v = np.bitwise_count(~words[1] & (words[1] - np.uint64(1))).astype(np.int64)
        is_taken = coins * 2.0**-64 < (chance := _chance(u / sigma + v, v))
        for n in np.flatnonzero(np.abs(coins * 2.0**-64 - chance) < CLOSE):
            more = derive(key, b"more bits", str(num_proposed + n).encode())[:16]
            is_taken[n] = _is_taken(int(u[n]), int(v[n]), sigma, int(coins[n]).to_bytes(8, "big") + more)
        is_negative = (words[0] & np.uint64(1)).astype(bool)
        magnitude = u + sigma * v
        # Only below a multiple of sigma is the remainder uniform; and 0 has but one sign.
        is_taken &= (place < limit) & ~(is_negative & (magnitude == 0))
        parts.append(np.where(is_negative, -magnitude, magnitude)[is_taken])
        num_drawn += len(parts[-1])
        num_proposed += PROPOSALS
    return np.concatenate(parts)[:num]


def _chance(x: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The probability of acceptance: at most 1, where x is 1 and V is 1."""
    return np.ldexp(np.exp((1 - x * x) / 2), v - 1)


def _is_taken(u: int, v: int, sigma: int, coin: bytes) -> bool:
    """The same decision with a coin of as many bits as wished."""
    with localcontext(prec=80):
        chance = ((1 - (Decimal(u) / sigma + v) ** 2) / 2).exp() * Decimal(2) ** (v - 1)
        return int.from_bytes(coin, "big") < chance * 2 ** (8 * len(coin))
