"""Simulate in a process of its own: one request as JSON on stdin, one plan a line on stdout.

``{"config", "recipes", "sequence_length", "micro_batch", "codec", "accumulated"}``. An error that
has a sentence ends the answer as ``{"code", "sentence"}`` with exit status 1.
"""

from __future__ import annotations

import json
import sys

from talkoot.protocol.errors import TalkootError
from talkoot.protocol.messages import CodecSpec
from talkoot.protocol.model import check_config
from talkoot.protocol.recipes import get


def main() -> int:
    """Answer the one request."""
    request = json.loads(sys.stdin.buffer.read())
    try:
        config = check_config(request["config"])
        import torch

        from talkoot.protocol.planner.simulate import simulate

        torch.set_num_threads(1)
        for name in request["recipes"]:
            plan = simulate(
                config,
                get(name),
                sequence_length=request["sequence_length"],
                micro_batch=request["micro_batch"],
                uplink=CodecSpec.model_validate(request["codec"]),
                accumulated=request["accumulated"],
            )
            print(json.dumps(plan.as_dict(), sort_keys=True), flush=True)
    except TalkootError as err:
        print(json.dumps({"code": err.code, "sentence": err.sentence}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
