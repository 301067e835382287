"""Faithfulness of summaries: a judge behind an OpenAI-compatible endpoint says whether a summary adds anything.

A binary judgement, as in the evaluation that the paper follows (Differential Transformer, arXiv 2410.05258, section
3.4); the wording is this project's own. The endpoint is given in the environment, so that the task also runs under
lm-eval's own command: `MEAP_JUDGE_URL` (up to and including `/v1`), `MEAP_JUDGE_MODEL`, `MEAP_JUDGE_KEY` if it needs
one, and `MEAP_JUDGE_LOG`, a file in which every verdict is kept, so that none is asked for twice.
"""

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from megatron_meap.errors import UsageError, one_line
from megatron_meap.evaluation.tasks.files import rows
from megatron_meap.evaluation.tasks.options import Options, Unsuitable, as_dataset
from megatron_meap.records import parsed

PROMPT = """Below are a document and a summary of it. Does the summary say anything that the document does not support?

Document:
{document}

Summary:
{summary}

Answer with one word: FAITHFUL if everything in the summary is supported by the document, HALLUCINATED otherwise."""
ENVIRONMENT = ("MEAP_JUDGE_URL", "MEAP_JUDGE_MODEL")
_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)
_LEAD = r"(?:(?:(?:the\s+|my\s+)?(?:final\s+)?(?:verdict|answer|judge?ment|label)(?:\s+is)?|json|boxed|text)\W+)*"
_VERDICT = re.compile(rf"\W*{_LEAD}(FAITHFUL|HALLUCINATED)\b(.*)", re.IGNORECASE | re.DOTALL)
_DENIED = re.compile(r"\W*?[:=?]\W*(?:FALSE|NO|0)\W*(?:$|[,.;}\n])")  # `"faithful": false`, the word being a question
TRIES = 5
TIMEOUT = 120.0
"""Seconds for one answer."""
GENERATED_TOKENS = 128
"""Room for a summary."""


class JudgeUnavailable(UsageError):
    """The endpoint does not answer; its verdicts so far are kept."""


def dataset(**metadata: Any) -> dict[str, Any]:
    """Documents to summarise, as lm-eval's `custom_dataset`; see `Options` for the metadata.

    Raises:
        UsageError: no file is given, or a line has no `document`.
    """
    return as_dataset(samples(Options.from_metadata(metadata)))


def samples(options: Options) -> list[dict[str, Any]]:
    """The first `options.samples` documents, cut to fit the longest context length.

    Returns:
        Rows with `prompt`, `document` as the model and the judge see it, `shortened` (whether it was cut) and `tokens`.
    """
    if options.summaries_file is None:
        raise UsageError("--summaries-file: needed for meap_faithfulness; give JSON Lines with the field document")
    found = []
    for place, row in rows(options.summaries_file, "--summaries-file"):
        if not isinstance(row.get("document"), str) or not row["document"].strip():
            raise UsageError(f"--summaries-file {place}: expected a JSON object with the field document")
        found.append(_sample(row["document"].strip(), options))
        if len(found) == options.samples:
            break
    if not found:
        raise UsageError(f"--summaries-file {options.summaries_file}: is empty")
    return found


def _sample(document: str, options: Options) -> dict[str, Any]:
    count, limit = options.count, max(options.max_seq_lengths)
    words = document.split(" ")
    kept = len(words)
    while (tokens := count(_prompt(words[:kept])) + GENERATED_TOKENS) > limit:
        kept = int(kept * 0.95 * limit / tokens)
        if kept < 1:
            raise Unsuitable(f"context length {limit}: no room for a document and a summary; use longer contexts")
    return {
        "prompt": _prompt(words[:kept]),
        "document": " ".join(words[:kept]),
        "shortened": kept < len(words),
        "tokens": tokens,
    }


def _prompt(words: list[str]) -> str:
    return f"{' '.join(words)}\n\nSummary of the text above:"


def judged(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """`process_results` of the task.

    Returns:
        `faithful`: 1 for a faithful summary, 0 for an unfaithful or empty one; missing if the judge's answer is not a
        verdict. `judged`: whether it is one. `words`: of the summary.
    """
    summary = results[0].strip()
    faithful = Judge.from_environment().faithful(doc["document"], summary) if summary else False
    verdict = {} if faithful is None else {"faithful": float(faithful)}
    return verdict | {"judged": float(faithful is not None), "words": float(len(summary.split()))}


def verdict(said: str) -> bool | None:
    """The verdict in a judge's answer; None if it does not begin with one.

    The word may follow `Verdict:` or the like, be in JSON or in `\\boxed{}`, or be a question with its answer; reasons
    may follow it.
    """
    match = _VERDICT.fullmatch(_THOUGHTS.sub("", said))
    if match is None:
        return None
    word, rest = match[1].upper(), match[2].upper()
    other = "HALLUCINATED" if word == "FAITHFUL" else "FAITHFUL"
    if other in rest:
        return None
    return (word == "FAITHFUL") != bool(_DENIED.match(rest))


class Judge:
    """An OpenAI-compatible chat endpoint that compares summaries with documents.

    Args:
        url: up to and including `/v1`.
        model: its name there.
        key: bearer token.
        log: JSON Lines file of verdicts; those in it are not asked for again.
    """

    def __init__(self, url: str, model: str, key: str | None = None, log: str | None = None) -> None:
        self.url, self.model, self.key = url.rstrip("/"), model, key
        self.log = Path(log) if log else None

    @classmethod
    def from_environment(cls) -> "Judge":
        """The judge that the environment names.

        Raises:
            UsageError: it names none.
        """
        url, model = (os.environ.get(name) for name in ENVIRONMENT)
        if not url or not model:
            raise UsageError(
                "--judge-url and --judge-model (or MEAP_JUDGE_URL, MEAP_JUDGE_MODEL): needed for the judge"
            )
        return cls(url, model, os.environ.get("MEAP_JUDGE_KEY"), os.environ.get("MEAP_JUDGE_LOG"))

    def faithful(self, document: str, summary: str) -> bool | None:
        """Whether the document supports everything in the summary; None if the judge gives no verdict.

        Raises:
            JudgeUnavailable: no answer after `TRIES` tries, or one that says that none will come.
        """
        prompt = PROMPT.format(document=document, summary=summary)
        digest = hashlib.sha256(f"{self.url}\n{self.model}\n{prompt}".encode()).hexdigest()
        known = self._known()
        if digest not in known:
            known[digest] = self._ask(prompt)
            if self.log:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                with open(self.log, "a") as file:
                    print(json.dumps({"sha256": digest, "faithful": known[digest], "summary": summary}), file=file)
        return known[digest]

    def _known(self) -> dict[str, bool | None]:
        """Verdicts so far; a line that a killed run left unfinished does not count."""
        known: dict[str, bool | None] = {}
        if self.log is not None and self.log.exists():
            for line in self.log.read_bytes().splitlines():
                with contextlib.suppress(ValueError):
                    row = parsed(line, {"sha256": str, "faithful": bool | None})
                    known[row["sha256"]] = row["faithful"]
        return known

    def _ask(self, prompt: str) -> bool | None:
        """Ask until there is an answer; None if it is not a verdict: at temperature 0 the next would be the same."""
        import httpx2
        import openai

        asked = f"no answer after {TRIES} tries"
        try:
            # Without a key the client would look for OpenAI's own in the environment.
            client = openai.OpenAI(
                base_url=self.url, api_key=self.key or "none", max_retries=TRIES - 1, timeout=TIMEOUT
            )
            answer = client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": prompt}], temperature=0
            )
            return verdict(str(answer.choices[0].message.content))
        except (httpx2.InvalidURL, UnicodeEncodeError) as error:
            asked, reason = "not asked", f"the URL or the key cannot be used: {error}"
        except openai.APIStatusError as error:
            if error.status_code not in (408, 409, 429) and error.status_code < 500:
                asked = "refused"
            reason = f"HTTP status {error.status_code}"
        except openai.APIError as error:
            reason = one_line(error.__cause__ or error)
        except (AttributeError, IndexError, TypeError, ValueError):
            asked, reason = "no judge", "what comes back is not a chat completion"
        kept = f"; verdicts so far are kept in {self.log}" if self.log and self.log.exists() else ""
        raise JudgeUnavailable(f"--judge-url {self.url}: {asked} ({reason}){kept}; the same command resumes")
