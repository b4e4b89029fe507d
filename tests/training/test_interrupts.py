"""Signals during training: held back until the step is finished, and ignored where they were."""

from __future__ import annotations

import signal

import pytest

from anymamba.training.interrupts import SIGNALS, deferred_signals


@pytest.mark.parametrize("number", SIGNALS)
def test_an_ignored_signal_stays_ignored(number):
    """A run in the background goes on when the terminal gets a Ctrl-C, instead of ending as if it were complete."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with deferred_signals() as pending:
            signal.raise_signal(number)
            assert pending.number is None
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_for_the_end(number):
    arrived = []
    before = signal.signal(number, lambda *_: arrived.append(number))
    try:
        with deferred_signals() as pending:
            signal.raise_signal(number)
            assert pending.number == number and not arrived
        assert arrived == [number]
    finally:
        signal.signal(number, before)
