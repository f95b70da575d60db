"""Prompts to what the UNet reads: tokens, one call of the text encoder, weights.

checked by  tests/unit/test_texts.py, tests/unit/test_textplan.py
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from . import textplan
from .bundle import Bundle
from .errors import RequestError
from .ports import Array, Floats, Open
from .request import Request
from .textplan import Plan
from .tokenizer import Tokenizer

KEPT = 8  # encoded pairs of prompts: 0.6 MB each at full size


class Texts:
    """The text half of a pipeline. Negative prompt and prompt go through the encoder in one call.

    What was encoded is kept by the tokens of that whole call, so that a result never depends on
    what ran before: a prompt beside another one may differ from itself alone in the last bit.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._facts = bundle.facts
        self._tokenizer = Tokenizer(bundle.tokenizer_file, bundle.facts.tokenizer)
        self._chunked = "T" in bundle.component("unet").spec.dims
        self._kept: OrderedDict[tuple[int, bytes], Floats] = OrderedDict()

    def plans(self, request: Request, guided: bool, warnings: list[str]) -> list[Plan]:
        """Tokens and weights of the negative prompt (where any row is guided) and of the prompt.

        warnings    what was cut off is added here
        raises      RequestError: more chunks than the model was exported for
        """
        prompts = {"prompt": request.prompt}
        if guided:
            prompts = {"negative prompt": request.negative_prompt, **prompts}
        options = {"weights": request.prompt_weights, "chunks": request.long_prompt}
        plans = [textplan.plan(self._tokenizer, text, **options) for text in prompts.values()]
        for name, plan in zip(prompts, plans, strict=True):
            if plan.dropped:
                room = self._facts.tokenizer.length - 2
                warnings.append(
                    f"the {name} is longer than {room} tokens; this was cut off: {plan.dropped}"
                )
        plans = textplan.level(self._tokenizer, plans)
        if len(plans[0]) > 1 and not self._chunked:
            raise RequestError(
                f"the prompt has {len(plans[0])} chunks; {self._facts.name} was exported for one",
                hint="export the checkpoint again with this version, or leave long_prompt out",
            )
        return plans

    def encode(self, sessions: Open, plans: list[Plan]) -> tuple[Floats | None, Floats]:
        """Text of the negative prompt (None where no row is guided) and of the prompt, [1, T, W].

        The encoder is not even opened for tokens that it has seen.
        """
        ids = np.concatenate([plan.ids for plan in plans])
        hidden = self._hidden(sessions, ids)
        parts = np.split(hidden, len(plans))
        texts = [textplan.weigh(h, p.weights) for h, p in zip(parts, plans, strict=True)]
        return (None if len(texts) == 1 else texts[0]), texts[-1]

    def _hidden(self, sessions: Open, ids: Array) -> Floats:
        """float32 [n, 77, W] of int64 ids [n, 77]."""
        key = (len(ids), ids.tobytes())
        if key not in self._kept:
            session = sessions("text_encoder", {"B": len(ids)})
            hidden: Floats = session({"input_ids": ids})["last_hidden_state"]
            hidden.flags.writeable = False
            self._kept[key] = hidden
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]
