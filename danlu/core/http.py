"""HTTP with patience: what a server that is busy, or away for a moment, does not answer is asked again."""

from requests import Session
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

RETRIES = 6
"""Of a request that gets no answer, or one that it should try again: after 0, 1, 2, 4 … seconds."""


def patient_session() -> Session:
    """Raises requests' RequestException where all tries were in vain."""
    session = Session()
    again = Retry(
        total=RETRIES,
        backoff_factor=1,
        status_forcelist=(408, 429, 500, 502, 503, 504),
        allowed_methods=None,
    )
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=again))
    return session
