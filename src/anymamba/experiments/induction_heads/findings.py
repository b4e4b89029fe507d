"""The findings: thresholds, and accuracy at each length next to table 11 of the paper."""

from __future__ import annotations

from anymamba.experiments.induction_heads.arms import PAPER, PAPER_FIRST
from anymamba.lab.charts import percent, spread, table
from anymamba.lab.experiment import Record, Results, Threshold
from anymamba.lab.language import task_speeds


def label(arm: str) -> str:
    """The name of an arm in tables and charts."""
    system, _, placement = arm.partition("-")
    return f"Mamba, {placement}" if system == "mamba" else PAPER[arm].label


def system_of(results: Results, arm: str) -> str:
    """The row of an arm in table 11."""
    return str(results.of(arm)[0].settings["system"])


def accuracies(record: Record) -> dict[int, float]:
    """The accuracy at each test length."""
    return {test["length"]: test["right"] / test["sequences"] for test in record.values["tests"]}


# --------------------------------------------------------------------------------------------------------- thresholds


def thresholds(results: Results) -> list[Threshold]:
    """The thresholds of every planned arm."""
    found = []
    for arm in results.planned_arms:
        found += (mamba_thresholds if arm.startswith("mamba") else other_thresholds)(arm, results.of(arm))
    return found


def learned(arm: str, records: list[Record]) -> Threshold:
    """At the end of training, every answer on the validation set at the training length is correct."""
    got = [record.values["accuracy"] for record in records]
    return Threshold(f"{label(arm)}: validation accuracy, %", got, at_least=1.0, show=percent)


def mamba_thresholds(arm: str, records: list[Record]) -> list[Threshold]:
    """Mamba learns the task, answers at every length, and learns within a time limit if the trigger is early."""
    first, worst = learned(arm, records), [min(accuracies(record).values()) for record in records]
    found = [first, Threshold(f"{label(arm)}: accuracy at its worst length, %", worst, at_least=1.0, show=percent)]
    if arm == "mamba-first-ten":
        # the time is not judged for a model that has not learned
        minutes = [minutes_to_learn(record) for record in records] if first.verdict == "holds" else []
        what = f"{label(arm)}: minutes of training until the validation set is right"
        found.append(Threshold(what, minutes, at_most=15.0, show="{:.1f}".format))
    return found


def minutes_to_learn(record: Record) -> float:
    """Minutes until the first evaluation without a mistake at the training length, if all steps take equally long.

    The earlier steps, at shorter lengths, take less time, so this is an upper bound.
    """
    values = record.values
    before = sum(steps for length, steps in values["stages"] if length < record.settings["train_length"])
    first = next(step for step, _, accuracy in values["curve"] if step > before and accuracy == 1)
    return values["training_seconds"] / 60 * first / values["steps"]


def other_thresholds(arm: str, records: list[Record]) -> list[Threshold]:
    """A baseline learns, and makes mistakes far beyond; attention is close to guessing at 16 times the length."""
    first = learned(arm, records)
    judged = records if first.verdict == "holds" else []  # mistakes of a model that has not learned show nothing
    best = [max(found) for record in judged if (found := beyond(record, times=4))]
    what = f"{label(arm)}: best accuracy from 4 times the training length on, %"
    thresholds = [first, Threshold(what, best, below=1.0, show=percent)]
    if arm.startswith("attention"):
        far = [found[0] for record in judged if (found := beyond(record, times=16))]
        what = f"{label(arm)}: accuracy at 16 times the training length, %"
        thresholds.append(Threshold(what, far, at_most=0.15, show=percent))
    return thresholds


def beyond(record: Record, times: int) -> list[float]:
    """Accuracies at lengths of at least `times` times the training length, shortest first."""
    return [a for length, a in accuracies(record).items() if length >= times * record.settings["train_length"]]


# ------------------------------------------------------------------------------------------------------------- tables


def sections(results: Results) -> dict[str, str]:
    """The sections of the report: the training of each arm, its accuracy at each length, and the speed of training."""
    return {
        "Training and reach": arms_table(results),
        "Accuracy at each length, %": lengths_table(results),
        **task_speeds(results),
    }


def arms_table(results: Results) -> str:
    """A table of the training of each arm, and of the lengths at which all its seeds make no mistake."""
    header = ["arm", "parameters (paper)", "d_model", "batch", "learning rate", "steps", "minutes", "validation, %"]
    header += ["lengths without a mistake", "test tokens a second"]
    rows = []
    for arm in results.arms:
        settings, how = results.of(arm)[0].settings, results.of(arm)[0].settings["optimization"]
        parameters = f"{results.values(arm, 'parameters')[0]:,} ({PAPER[settings['system']].parameters})"
        minutes = [seconds / 60 for seconds in results.values(arm, "training_seconds")]
        rows.append(
            [
                *(label(arm), parameters, f"{settings['model']['d_model']}"),
                *(f"{how['batch_size']}", f"{how['learning_rate']:g}", spread(results.values(arm, "steps"), digits=0)),
                *(spread(minutes), spread(results.values(arm, "accuracy"), scale=100)),
                *(reach(results, arm), tokens_a_second(results, arm)),
            ]
        )
    return table(header, rows)


def reach(results: Results, arm: str) -> str:
    """The number of lengths at which no seed makes a mistake, and the longest of them."""
    found = [accuracies(record) for record in results.of(arm)]
    perfect = [length for length in found[0] if all(a.get(length) == 1 for a in found)]
    return f"{len(perfect)} of {len(found[0])}" + (f", longest {power(max(perfect))}" if perfect else "")


def power(length: int) -> str:
    """A power of two, written as one."""
    return f"2^{length.bit_length() - 1}"


def tokens_a_second(results: Results, arm: str) -> str:
    """The speed over all tests; "" if their time was too short to measure."""
    tests = [test for record in results.of(arm) for test in record.values["tests"]]
    seconds = sum(test["seconds"] for test in tests)
    return f"{sum(test['length'] * test['sequences'] for test in tests) / seconds:,.0f}" if seconds else ""


def lengths_table(results: Results) -> str:
    """A row for each length: the number of sequences, and each arm next to its row in the paper's table 11."""
    tests = {t["length"]: t["sequences"] for r in results.records for t in r.values["tests"]}
    columns: dict[str, list[str]] = {}
    for arm in results.arms:
        found, system = [accuracies(record) for record in results.of(arm)], system_of(results, arm)
        columns[label(arm)] = [spread([a[n] for a in found if n in a], scale=100) for n in sorted(tests)]
        columns.setdefault(f"paper, {PAPER[system].label}", [published(system, n) for n in sorted(tests)])
    rows = [[power(n), f"{tests[n]}", *(column[i] for column in columns.values())] for i, n in enumerate(sorted(tests))]
    return table(["length", "sequences", *columns], rows)


def published(system: str, length: int) -> str:
    """The paper's accuracy in percent; "" if it has none."""
    place, row = length.bit_length() - 1 - PAPER_FIRST, PAPER[system].accuracy
    return f"{row[place]:g}" if 0 <= place < len(row) else ""
