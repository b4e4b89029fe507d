"""The waiting policy of OpenMP that the command line sets."""

from __future__ import annotations

import os

import pytest

from anymamba.console.openmp import CHOICES, SETTINGS, set_waiting


@pytest.fixture
def environment(monkeypatch):
    for name in {*CHOICES, *SETTINGS}:
        monkeypatch.setenv(name, "")  # so that it is restored after the test
        monkeypatch.delenv(name)
    return monkeypatch


def test_threads_sleep_soon(environment):
    set_waiting()
    assert {name: os.environ[name] for name in SETTINGS} == SETTINGS


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "infinity")])
def test_the_users_choice_stays(environment, name, value):
    environment.setenv(name, value)
    set_waiting()
    assert {n: os.environ[n] for n in {*CHOICES, *SETTINGS} if n in os.environ} == {name: value}
