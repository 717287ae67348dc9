"""What the simulated model says: text that depends on nothing but the text before it.

Like a greedy model, each token is a function of all text so far (prompt and generated alike) and of
the seed. So the same request gives the same text on every replica, and a request whose prompt is
another's prompt plus the beginning of its answer continues exactly where that one left off: a
stream can move to another engine in the middle.
"""

from __future__ import annotations

from hashlib import blake2b

CHARACTERS_PER_TOKEN = 8

# The text ends where this word falls, so without a limit an answer has len(WORDS) + 1 tokens on
# average, and an answer is never empty unless the prompt itself ends with this word.
CLOSING_WORD = "calm."

WORDS = tuple(
    """
    a above across after air all along always an anchor and any around as at away back bay be
    beach before below beside between bird blow blue boat bora both bow breeze bright by captain
    change clear cliff cloud coast cold come course crew dark dawn day deck deep down each east
    edge even every fall far fast few find first fish flag for from full gale go gone grey gull
    gust half harbour haul high hill hold home hour hull in into island it keel land late lead
    leave lee light line long low map mast moon morning mouth near net never new night no north
    oar of off old on once open out over past pier port quay rain reef rise rock rope round sail
    salt sand sea shore sky slow so south spray star stern still stone storm strait sun swell that
    the then there tide to tower under until up wait warm watch water wave west where white wide
    wind with
    """.split()  # noqa: SIM905 - a list of 170 quoted words reads worse
)


def count_tokens(text: str) -> int:
    """Tokens of `text`: one for each word, and one more for each further 8 characters of it.

    Every word of `WORDS` is one token, so what was generated counts the same when it comes back
    as part of a prompt.
    """
    return sum(-(-len(word) // CHARACTERS_PER_TOKEN) for word in text.split())


def token_ids(text: str) -> list[int]:
    """Made-up ids of the tokens of `text`; equal pieces have equal ids."""
    pieces = [
        word[start : start + CHARACTERS_PER_TOKEN]
        for word in text.split()
        for start in range(0, len(word), CHARACTERS_PER_TOKEN)
    ]
    return [
        int.from_bytes(blake2b(_bytes(piece), digest_size=2).digest(), "big") for piece in pieces
    ]


def _bytes(text: str) -> bytes:
    # JSON may hold half a surrogate pair, which plain UTF-8 refuses.
    return text.encode("utf-8", "surrogatepass")


class Continuation:
    """The text that follows `prompt`, token by token."""

    def __init__(self, prompt: str, *, seed: int | None = None, ignore_eos: bool = False) -> None:
        self._hash = blake2b(_bytes(prompt), digest_size=8, key=str(seed).encode()[:64])
        self._needs_space = bool(prompt) and not prompt[-1].isspace()
        self._ended = prompt.endswith(CLOSING_WORD)
        self._ignore_eos = ignore_eos

    def next_token(self) -> str | None:
        """The next word, with the space before it; None: the model has ended its answer."""
        if self._ended and not self._ignore_eos:
            return None
        pick = int.from_bytes(self._hash.digest(), "big") % (len(WORDS) + 1)
        word = WORDS[pick] if pick < len(WORDS) else CLOSING_WORD
        token = f" {word}" if self._needs_space else word
        self._hash.update(token.encode())
        self._needs_space = True
        self._ended = word == CLOSING_WORD
        return token


class StopStrings:
    """Cuts a text that comes in pieces at the first stop string.

    It holds back what may be the beginning of one, so that nothing is ever taken back.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._num_held = max((len(string) for string in stop), default=1) - 1
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Text that may be shown now, and whether a stop string ended it."""
        text = self._held + piece
        found = [text.index(string) for string in self._stop if string in text]
        if found:
            self._held = ""
            return text[: min(found)], True
        cut = max(len(text) - self._num_held, 0)
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held
