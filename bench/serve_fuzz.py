"""Malformed requests against a server, made by schemathesis from its own OpenAPI.

    python bench/serve_fuzz.py --url http://127.0.0.1:7860 --requests 1000

Wrong is: an answer of 5xx, one that is refused without a JSON error, and none within a minute.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from typing import Any

import hypothesis
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

LIMIT_S = 60
MODES = (GenerationMode.NEGATIVE, GenerationMode.NEGATIVE, GenerationMode.POSITIVE)


def fuzz(url: str, requests: int) -> tuple[Counter[int], list[str]]:
    """(answers by status, what was wrong)."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    making = [o for o in operations if o.method.upper() != "GET"]
    # routes that take something get three times the share of those that do not
    order = [*operations, *making, *making]
    codes: Counter[int] = Counter()
    wrong: list[str] = []
    each = max(1, requests // len(order) + 1)
    number = 0
    while codes.total() < requests:
        operation = order[number % len(order)]
        _one(operation, MODES[number % len(MODES)], number, each, codes, wrong)
        number += 1
    return codes, wrong


def _one(
    operation: Any, mode: GenerationMode, seed: int, each: int, codes: Counter[int],
    wrong: list[str],
) -> None:  # fmt: skip
    def call(case: Any) -> None:
        answer = case.call(timeout=LIMIT_S)
        codes[answer.status_code] += 1
        where = f"{case.method} {case.path}: {answer.status_code}"
        if answer.status_code >= 500:
            wrong.append(f"{where} {answer.text[:200]} for {str(case.body)[:200]}")
        elif answer.status_code >= 400 and case.method != "HEAD":
            try:
                json.loads(answer.text)
            except ValueError:
                wrong.append(f"{where} is no JSON: {answer.text[:100]}")

    run = hypothesis.given(operation.as_strategy(generation_mode=mode))(call)
    run = hypothesis.settings(
        max_examples=each, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )(hypothesis.seed(seed)(run))  # fmt: skip
    try:
        run()
    except Unsatisfiable:  # a route without parameters has no malformed call
        return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--requests", type=int, default=1000)
    arguments = parser.parse_args()
    codes, wrong = fuzz(arguments.url, arguments.requests)
    for line in wrong[:20]:
        sys.stdout.write(f"{line}\n")
    told = ", ".join(f"{code}: {n}" for code, n in sorted(codes.items()))
    sys.stdout.write(f"{codes.total()} requests ({told}), {len(wrong)} wrong\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
