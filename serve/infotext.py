"""AUTOMATIC1111's text about a picture, read: prompt, negative prompt, and a line of fields.

source      its rules for the last line: `Key: value` with commas between, a value with commas or
            colons in it as a JSON string
checked by  tests/http/test_sdapi_words.py
"""

from __future__ import annotations

import json
import re
from typing import Any

NEGATIVE = "Negative prompt:"
# A field begins where the line or the one before it ends, and a key gives nothing back: no text
# takes more than linear time.
_FIELD = re.compile(r'(?:^|(?<=,))\s*+([\w /]++):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
LONGEST = 2**16  # characters that are read
LEAST = 3  # fields in a line that counts as one


def parse(text: str) -> dict[str, str]:
    """`Prompt`, `Negative prompt` and the fields, as text; {} for none."""
    text = text[:LONGEST]
    lines = text.strip().split("\n")
    found = _FIELD.findall(lines[-1]) if lines else []
    if len(found) >= LEAST:
        lines = lines[:-1]
    else:
        found = []
    prompt: list[str] = []
    negative: list[str] = []
    part = prompt
    for line in lines:
        if line.strip().startswith(NEGATIVE):
            part, line = negative, line.strip().removeprefix(NEGATIVE)
        part.append(line.strip())
    fields = {key.strip(): _plain(value) for key, value in found}
    if not text.strip():
        return {}
    return {"Prompt": "\n".join(prompt), "Negative prompt": "\n".join(negative), **fields}


def asked(text: str) -> dict[str, Any]:
    """The fields of a request that a text stands for; what it does not say is left out."""
    found = parse(text)
    given: dict[str, Any] = {}
    names = {
        "Prompt": "prompt",
        "Negative prompt": "negative_prompt",
        "Sampler": "sampler_name",
        "Schedule type": "scheduler",
    }
    for theirs, ours in names.items():
        if theirs in found:
            given[ours] = found[theirs]
    for theirs, ours in {"Steps": "steps", "Seed": "seed"}.items():
        if found.get(theirs, "").isdecimal():
            given[ours] = int(found[theirs][:12])
    for theirs, ours in {
        "CFG scale": "cfg_scale",
        "Denoising strength": "denoising_strength",
    }.items():
        number = re.fullmatch(r"\d{1,6}(\.\d{1,12})?", found.get(theirs, ""))
        if number:
            given[ours] = float(number[0])
    size = re.fullmatch(r"(\d{1,6})x(\d{1,6})", found.get("Size", ""))
    if size:
        given["width"], given["height"] = int(size[1]), int(size[2])
    return given


def _plain(value: str) -> str:
    text = value.strip()
    if text.startswith('"'):
        try:
            return str(json.loads(text))
        except ValueError:
            return text
    return text
