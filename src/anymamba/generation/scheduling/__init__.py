"""Requests on their way through an engine: taken from other threads, waiting, being read, searching."""

from anymamba.generation.scheduling.checks import check_request
from anymamba.generation.scheduling.inbox import Inbox
from anymamba.generation.scheduling.jobs import AnswerRow, Job
from anymamba.generation.scheduling.prompt_reading import PassError, PromptReading
from anymamba.generation.scheduling.reading import Piece, PieceRead
from anymamba.generation.scheduling.searches import RunningSearch

__all__ = [
    "AnswerRow",
    "Inbox",
    "Job",
    "PassError",
    "Piece",
    "PieceRead",
    "PromptReading",
    "RunningSearch",
    "check_request",
]
