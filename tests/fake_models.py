"""Models for lm-eval whose scores are known beforehand: they read the prompt and answer by rule."""

import hashlib
import re
from collections.abc import Callable

from lm_eval.api.model import LM

WRONG = "nothing of the kind"


class RuleModel(LM):
    """Answers by a rule: a function of the prompt that returns the right answer, or None if it does not know it.

    The likeliest choice is the one that holds the answer; where it does not know, one that depends on a hash.
    """

    def __init__(self, rule: Callable[[str], str | None]) -> None:
        super().__init__()
        self.rule = rule

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        return [self.rule(request.args[0]) or WRONG for request in requests]

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [self._score(*request.args) for request in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError

    def _score(self, prompt: str, choice: str) -> tuple[float, bool]:
        answer = self.rule(prompt)
        if answer is None:
            digest = hashlib.sha256((prompt + choice).encode()).digest()
            return -10.0 * digest[0] / 255 - 1, False
        right = answer == choice.strip().strip('"')
        return (-0.5, True) if right else (-20.0, False)


def nothing(prompt: str) -> None:
    """Never knows."""


def look_up(prompt: str) -> str | None:
    """Finds the answer of a needle, key-value or kinship prompt in its text."""
    if match := re.search(r'(?:Key: |\}\n)"([^"]+)"(?:\nCorresponding value:|: ")$', prompt):
        return dict(re.findall(r'"([^"]+)": "([^"]+)"', prompt))[match[1]]
    if match := re.search(r"special magic number for (\w+) is$", prompt):
        found = re.search(rf"The special magic number for {match[1]} is (\d+)\.", prompt)
        return found[1] if found else None
    if match := re.search(r"eldest relative that ([\w ]+) can be traced back to is$", prompt):
        return _eldest(prompt, match[1])
    return None


def _eldest(text: str, person: str) -> str:
    name = r"([A-Z]\w+ [A-Z]\w+)"
    relative = r"(?:grand)?(?:father|mother)"
    elders = {}
    for elder, younger in re.findall(rf"{name} is the {relative} of {name}\.", text):
        elders[younger] = elder
    for younger, elder in re.findall(rf"The {relative} of {name} is {name}\.", text):
        elders[younger] = elder
    for younger, elder in re.findall(rf"{name} was brought up by {name}, the {relative} of", text):
        elders[younger] = elder
    while person in elders:
        person = elders[person]
    return person
