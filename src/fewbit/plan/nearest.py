"""Say which known name an unknown one was probably meant to be."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """``": did you mean 'x'? available: ..."``, or without the question where nothing is near."""
    names = sorted(choices)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    question = f" did you mean '{close[0]}'?" if close else ""
    return f":{question} available: {', '.join(names) or 'none'}"
