"""A language model that judges answers, behind any endpoint that speaks OpenAI's chat interface."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

BUSY = (408, 409, 429, 500, 502, 503, 504)  # worth asking again
LONGEST_WAIT = 60.0  # seconds between two attempts
SCORE = re.compile(r"(?<![\d.])(?:0?\.\d+|1(?:\.0+)?|0(?:\.\d*)?)(?![\d.]*\d)")
PROMPT = """\
Someone was asked a question about an image that you cannot see. Compare the answer with the \
reference answer and say how right it is, from 0 (wrong) to 1 (right); 0.5 if it is right in part. \
Other words for the same thing are right. Reply with the number alone.

Question: {question}
Reference answer: {reference}
Answer: {answer}"""


class JudgeError(ConnectionError):
    """The judge could not be asked; the message says why, without the key."""


@dataclass(frozen=True)
class JudgeConfig:
    """Whom to ask and how.

    Attributes:
        url: base address of the interface, such as `http://127.0.0.1:8000/v1`.
        model: name of the judging model.
        api_key_env: environment variable that holds the key; None for endpoints without one.
        timeout: seconds to wait for a connection, and for a reply.
        retries: further attempts when the endpoint is down, slow or busy.
        backoff: seconds before the second retry; each further wait is twice as long.
        concurrency: questions asked at the same time.
        max_tokens: longest reply.
        prompt: with the places `{question}`, `{reference}` and `{answer}`.

    Raises:
        ValueError: naming the field that cannot be.
    """

    url: str
    model: str
    api_key_env: str | None = None
    timeout: float = 60.0
    retries: int = 5
    backoff: float = 1.0
    concurrency: int = 8
    max_tokens: int = 16
    prompt: str = PROMPT

    def __post_init__(self):
        if not re.match(r"https?://[^/]", self.url):
            raise ValueError(f"judge: url must begin with http:// or https://, got {self.url!r}")
        if not self.model:
            raise ValueError("judge: model is missing")
        if self.timeout <= 0 or self.backoff < 0:
            raise ValueError("judge: timeout must be positive and backoff not negative")
        if self.retries < 0 or self.concurrency < 1 or self.max_tokens < 1:
            raise ValueError(
                "judge: retries must not be negative, concurrency and max_tokens be at least 1"
            )
        for place in ("{question}", "{reference}", "{answer}"):
            if place not in self.prompt:
                raise ValueError(f"judge: prompt lacks {place}")


class Judge:
    """Asks for scores.

    Args:
        config: whom to ask and how.

    Raises:
        ValueError: when the environment variable of the key is not set.
    """

    def __init__(self, config: JudgeConfig):
        self.config = config
        self._key = None
        if config.api_key_env is not None:
            self._key = os.environ.get(config.api_key_env)
            if not self._key:
                raise ValueError(f"judge: the environment variable {config.api_key_env} is not set")
        retry = Retry(
            total=config.retries,
            backoff_factor=config.backoff / 2,
            backoff_max=LONGEST_WAIT,
            status_forcelist=BUSY,
            allowed_methods=None,
            raise_on_status=False,
            respect_retry_after_header=False,
        )
        adapter = HTTPAdapter(max_retries=retry, pool_maxsize=config.concurrency)
        self._session = requests.Session()
        self._session.auth = self._authorise  # keeps .netrc out as well
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapter)

    def score(self, question: str, reference: str | Sequence[str], answer: str) -> float | None:
        """How right an answer is, from 0 to 1; None when the reply holds no such number.

        Raises:
            JudgeError: when the endpoint refuses, or still fails after the retries.
        """
        references = reference if isinstance(reference, str) else " / ".join(reference)
        places = {"question": question, "reference": references, "answer": answer}
        # One pass, so that braces in a question or an answer stay what they are.
        text = re.sub(r"{(question|reference|answer)}", lambda m: places[m[1]], self.config.prompt)
        found = SCORE.search(self._ask(text))
        return float(found[0]) if found else None

    def scores(
        self,
        questions: Sequence[str],
        references: Sequence[str | Sequence[str]],
        answers: Sequence[str],
    ) -> list[float | None]:
        """`score` of several answers, some at the same time; the first failure ends it."""
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            asked = [
                pool.submit(self.score, *each)
                for each in zip(questions, references, answers, strict=True)
            ]
            try:
                return [each.result() for each in asked]
            except JudgeError:
                pool.shutdown(cancel_futures=True)
                raise

    def _ask(self, text: str) -> str:
        """The reply to one message."""
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": self.config.max_tokens,
        }
        url = f"{self.config.url.rstrip('/')}/chat/completions"
        try:
            response = self._session.post(url, json=body, timeout=self.config.timeout)
        except requests.RequestException as error:
            attempts = self.config.retries + 1
            raise self._error(f"gave no reply in {attempts} attempts: {error}") from None
        if not response.ok:
            raise self._error(f"replied {response.status_code}: {response.text[:200]}")
        try:
            return response.json()["choices"][0]["message"]["content"] or ""
        except (ValueError, LookupError, TypeError):
            raise self._error(f"replied no chat completion: {response.text[:200]}") from None

    def _authorise(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _error(self, what: str) -> JudgeError:
        message = f"the judge at {self.config.url} {what}"
        return JudgeError(message.replace(self._key, "***") if self._key else message)
