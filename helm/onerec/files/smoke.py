"""`helm test`: asks the collector and the model server as a client would, and says what is wrong.

Standard library only. Variables: ONEREC_COLLECTOR_URL, ONEREC_CLIENT_TOKEN, ONEREC_SERVER_URL, and MODEL, which is
empty when nothing serves. Left out: sending real events, which would be trained on.
"""

import json
import os
import sys
import urllib.error
import urllib.request


def ask(url: str, body: object = None, token: str = "") -> tuple[int, str]:
    """Status and text of the answer; status 0 when nobody answers."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


def main() -> int:
    """1 when anything is not as a client needs it."""
    collector, server, model = (os.environ[name] for name in ("ONEREC_COLLECTOR_URL", "ONEREC_SERVER_URL", "MODEL"))
    events = {"events": []}
    steps = [
        ("the collector is ready", 200, f"{collector}/readyz", None, ""),
        ("it takes the client's token", 202, f"{collector}/v1/events", events, os.environ["ONEREC_CLIENT_TOKEN"]),
        ("it takes no other", 401, f"{collector}/v1/events", events, "wrong"),
    ]
    if model:
        user = {"name": "user_id", "datatype": "BYTES", "shape": [1], "data": ["smoke-test"]}
        ready, infer = (f"{server}/v2/models/{model}/{what}" for what in ("ready", "infer"))
        steps += [
            ("a model is in service", 200, ready, None, ""),
            ("it recommends to somebody new", 200, infer, {"inputs": [user], "parameters": {"num_items": 3}}, ""),
        ]
    failed = 0
    for what, wanted, url, body, token in steps:
        status, text = ask(url, body, token)
        failed += status != wanted
        print(f"{'ok  ' if status == wanted else 'FAIL'} {what}: {status} {text[:200]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
