"""leap compare before any server answers: what is no URL is said in a sentence."""

from __future__ import annotations

import pytest

from leap_serve.errors import LeapError, UsageError
from leap_serve.evaluation.compare import Asking, compare


@pytest.mark.parametrize("url", ["http://127.0.0.1:80a0", "http://[::1", "127.0.0.1:8000", "http://"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(LeapError, match=r"cannot be reached .*check the URL"):
        compare(url, ["a"], ["b"], Asking())


def test_a_key_that_no_header_can_hold() -> None:
    with pytest.raises(UsageError, match="--api-key: holds letters"):
        compare("http://127.0.0.1:1", ["a"], ["b"], Asking(api_key="ä"))
