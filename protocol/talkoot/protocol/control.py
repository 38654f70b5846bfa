"""What a control-plane message through Flower looks like: the names of its records.

A task travels as ``Message(RecordDict({TASK_RECORD: ConfigRecord({TASK_KEY: <Signed as JSON>})}))``
of type :data:`MESSAGE_TYPE`; its reply as ``{VERDICT_RECORD: {VERDICT_KEY: <Verdict as JSON>}}``.
"""

from __future__ import annotations

from typing import Final

MESSAGE_TYPE: Final = "train"
TASK_RECORD: Final = "task"
TASK_KEY: Final = "signed"
VERDICT_RECORD: Final = "verdict"
VERDICT_KEY: Final = "json"
