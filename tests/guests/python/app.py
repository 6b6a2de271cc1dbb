"""A small handler in Python, for the tests of the host: every function of the contract, every outcome, by the task's kind."""

import json
import time

from componentize_py_types import Err
from wit_world import exports
from wit_world.imports import context, log
from wit_world.imports.context import Progress, Submission
from wit_world.imports.types import (
    Failure,
    FailureKind,
    Finished,
    Outcome_Finish,
    Outcome_Release,
    Outcome_Retry,
    Task,
)

# How long a task waits for what its test does: longer than any test takes.
PATIENCE_S = 600

Outcome = Outcome_Finish | Outcome_Retry | Outcome_Release


class Handler(exports.Handler):
    def handle(self, task: Task) -> Outcome:
        log.log(log.Level.INFO, f"{task.key} attempt {task.attempt}")
        # An exception that nobody catches would be a trap, without its text.
        try:
            return handle(task, json.loads(task.data))
        except Err:
            raise
        except Exception as error:
            raise Err(Failure(FailureKind.RETRY, type(error).__name__, str(error))) from error


def handle(task: Task, data: dict) -> Outcome:
    match task.kind:
        case "echo":
            return finish(data)
        case "silent":
            return Outcome_Finish(Finished(None, None))
        case "finish":
            return Outcome_Finish(Finished(json.dumps(data["output"]).encode(), data.get("retention_ms")))
        case "retry":
            return Outcome_Retry(data.get("delay_ms"))
        case "release":
            return Outcome_Release(data.get("delay_ms"))
        case "fail":
            kind = FailureKind.REJECT if data.get("kind") == "reject" else FailureKind.RETRY
            raise Err(Failure(kind, data.get("code", "on-purpose"), data.get("message", "the task asked for this failure")))
        case "raise":
            raise ValueError("on purpose")
        case "describe":
            return finish(describe(task, data))
        case "heartbeat":
            return finish({"held": context.heartbeat(Progress(1, 2, "half"), data.get("alive_time_ms"))})
        case "wait-cancelled":
            give_up = time.monotonic() + PATIENCE_S
            # A guest is asked to end by nothing that it could wait for.
            while (reason := context.is_cancelled()) is None:
                if time.monotonic() > give_up:
                    raise Err(Failure(FailureKind.REJECT, "never-cancelled", f"nobody cancelled this attempt within {PATIENCE_S} s"))
                time.sleep(0.005)
            log.log(log.Level.WARN, f"cancelled: {reason.name}")
            return Outcome_Release(None)
        case "update":
            context.update_data(json.dumps(data["members"]).encode())
            return finish(data)
        case "submit":
            return submit(task, data)
        case "log":
            print("stdout", data.get("text"))
            return finish({"enabled": [level.name.lower() for level in log.Level if log.enabled(level)]})
        case kind:
            raise Err(Failure(FailureKind.REJECT, "no-such-kind", f"this handler has no `{kind}`"))


def describe(task: Task, data: dict) -> dict:
    return {
        "key": task.key,
        "kind": task.kind,
        "data": data,
        "user": task.user,
        "attempt": task.attempt,
        "created_at": context.created_at(),
        "deadline": context.deadline(),
        "max_attempts": context.max_attempts(),
        "queue": context.queue(),
        "settings": dict(context.settings()),
        "setting": context.setting(data["setting"]) if "setting" in data else None,
    }


def submit(task: Task, data: dict) -> Outcome:
    submission = Submission(data.get("key", f"{task.key}-next"), data.get("kind", "silent"))
    said = {
        "run_at_ms": submission.run_at,
        "user": submission.user,
        "max_running": submission.max_running,
        "max_attempts": submission.max_attempts,
        "priority": submission.priority,
        "queue": submission.queue,
    }
    for name, say in said.items():
        if data.get(name) is not None:
            say(data[name])
    try:
        submission.submit(json.dumps(data.get("data", {})).encode())
    except Err as error:
        return finish({"submitted": 0, "code": error.value.code, "message": error.value.message})
    return finish({"submitted": 1})


def finish(output: dict) -> Outcome:
    return Outcome_Finish(Finished(json.dumps(output).encode(), None))
