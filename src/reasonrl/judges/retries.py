"""When to ask a server again, and when to stop asking it: full-jitter backoff, and a circuit breaker.

Both are told the time and the draw, so that what they do is a function of what they are given.
"""

from __future__ import annotations

import math
from collections import deque
from email.utils import parsedate_to_datetime
from typing import final


def backoff_s(retry: int, *, base_s: float, most_s: float, draw: float) -> float:
    """Returns the seconds before retry 0, 1, ...: uniform in 0..min(most_s, base_s · 2^retry), at `draw` in [0, 1].

    Full jitter (Brooker, "Exponential Backoff And Jitter", 2015): what failed at once does not come back at once.
    """
    return draw * min(most_s, base_s * 2.0 ** min(retry, 60))


def asked_to_wait_s(retry_after: str, *, now: float, most_s: float) -> float:
    """Returns what a Retry-After header asks for, in 0..most_s seconds; 0 for what is neither a number nor a date.

    `now` is the wall clock, seconds since 1970: a header may name a date.
    """
    try:
        asked = float(retry_after)
    except ValueError:
        try:
            asked = parsedate_to_datetime(retry_after).timestamp() - now
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return 0.0 if math.isnan(asked) else min(max(asked, 0.0), most_s)


@final
class Breaker:
    """Lets attempts through while a server is there; when it is not, one every `cool_s` seconds.

    Closed: all pass; a failure opens it when, with it, the share `share` of the last `window` attempts failed. Open:
    none passes. After `cool_s` one does, the probe: it closes or opens it again. Attempts begun before a change say
    nothing after it.
    Not for several threads.
    """

    def __init__(self, *, window: int, share: float, cool_s: float) -> None:
        self.share = share
        self.cool_s = cool_s
        self._recent: deque[bool] = deque(maxlen=window)
        self._opened: float | None = None
        self._probe: int | None = None
        self._next = 0
        self._since = 0

    @property
    def is_open(self) -> bool:
        """Whether attempts are held back, a probe apart."""
        return self._opened is not None

    @property
    def probing(self) -> bool:
        """Whether a probe is under way: then waiting for it is worth it."""
        return self._probe is not None

    def admit(self, now: float) -> int | None:
        """Returns an attempt's number, which `report` or `drop` takes; None = do not ask."""
        if self._opened is not None:
            if self.probing or now < self._opened + self.cool_s:
                return None
            self._probe = self._next
        self._next += 1
        return self._next - 1

    def report(self, attempt: int, *, reached: bool, now: float) -> None:
        """Takes in whether an attempt reached the server."""
        if attempt < self._since:
            return
        if attempt == self._probe:
            self._turn(None if reached else now)
            return
        self._recent.append(reached)
        whole = len(self._recent) == self._recent.maxlen
        if not reached and whole and self._recent.count(False) >= self.share * len(self._recent):
            self._turn(now)

    def drop(self, attempt: int) -> None:
        """Forgets an attempt that was given up, without a result."""
        if attempt == self._probe:
            self._probe = None

    def _turn(self, opened: float | None) -> None:
        self._opened, self._probe, self._since = opened, None, self._next
        self._recent.clear()
