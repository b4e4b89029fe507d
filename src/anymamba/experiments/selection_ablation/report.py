"""The report: tables 7 and 10 with our numbers, the thresholds, and what the results say of them."""

from __future__ import annotations

from dataclasses import replace
from math import inf, isfinite, log

from anymamba.experiments.charts import spread, table
from anymamba.experiments.checks import TIED, Check, checks_table, verdict
from anymamba.experiments.experiment import Record, Results
from anymamba.experiments.selection_ablation.arms import (
    CHOSEN,
    KINDS,
    MAY_TIE,
    ORDER,
    PAPER_7,
    PAPER_10,
    SELECTIVE,
    SELECTIVE_AT_LEAST,
    STATE_RATIO,
    STATES,
    TIE,
    TRANSFORMER,
    WITHOUT_BELOW,
    paper_gap,
)

WORDS = {"none": "none", "B": "B", "C": "C", "delta": "Δ", "all": "Δ, B, C"}
LOG_2 = log(2)
MEANS_COUNT = f"Set before running, for means over the seeds; a difference of at most {TIE:g} nats is a tie."


def report(results: Results) -> str:
    """The Markdown between title and provenance."""
    if not results.records:
        return "Nothing has been measured yet."
    parts = [verdict(checks(results), "expectations"), protocol(results)]
    parts += ["## Table 7: what is selective", table_7(results)]
    parts += ["## Table 10: the size of the state", table_10(results), "## Transformer++", transformer_words(results)]
    parts += ["## Expectations", MEANS_COUNT, checks_table(checks(results)), "## What came out", remarks(results)]
    return "\n\n".join(parts)


# ------------------------------------------------------------------------------------------------ reading the results


def losses(results: Results, arm: str) -> list[float]:
    """Held-out nats a byte of each seed of `lm-ARM`; infinite where training diverged."""
    return [inf if value is None else value for value in results.values(f"lm-{arm}", "validation_loss")]


def mean(values: list[float]) -> float | None:
    """None where there is none."""
    return sum(values) / len(values) if values else None


def loss(results: Results, arm: str) -> float | None:
    """The mean of an arm's losses."""
    return mean(losses(results, arm))


def gap(results: Results, above: str, below: str) -> float | None:
    """Nats between the means of two arms of the language model, None where one is missing or diverged."""
    a, b = loss(results, above), loss(results, below)
    return a - b if a is not None and b is not None and isfinite(a) and isfinite(b) else None


def accuracy(results: Results, name: str) -> float | None:
    """Of selective copying, the mean of the seeds."""
    return mean(results.values(f"copying-{name}", "accuracy"))


def first(results: Results, start: str) -> Record | None:
    """The first record of the arms whose names start so."""
    return next((record for record in results.records if record.arm.startswith(start)), None)


def signed(value: float | None) -> str:
    """Nats with their sign, or nothing."""
    return "" if value is None else f"{value:+.3f}"


# -------------------------------------------------------------------------------------------------------- expectations


def checks(results: Results) -> list[Check]:
    """All of them, over the means of the seeds."""
    pairs = [order_check(results, above, below) for above, below in ORDER]
    return [*copying_checks(results), *pairs, state_check(results)]


def copying_checks(results: Results) -> list[Check]:
    """Everything selective solves selective copying, nothing selective does not."""
    whole, without = accuracy(results, "all"), accuracy(results, "none")
    first = Check(f"copying: accuracy, {WORDS['all']} selective, %", f"at least {100 * SELECTIVE_AT_LEAST:.0f}")
    second = Check("copying: points that none lies below it", f"at least {100 * WITHOUT_BELOW:.0f}")
    if whole is not None:
        first = first.judged(f"{100 * whole:.1f}", whole >= SELECTIVE_AT_LEAST)
        if without is not None:
            second = second.judged(f"{100 * (whole - without):.1f}", whole - without >= WITHOUT_BELOW)
    return [first, second]


def order_check(results: Results, above: str, below: str) -> Check:
    """The loss falls from one to the next by more than a tie, or does not rise by more where they may be alike."""
    alike = (above, below) == MAY_TIE
    check = Check(
        f"language model: loss of {WORDS[above]} minus that of {WORDS[below]}, nats",
        f"more than {-TIE if alike else TIE:g} (paper {paper_gap(PAPER_7[above], PAPER_7[below]):+.3f})",
    )
    got = gap(results, f"{above}-n16", f"{below}-n16")
    if got is None:
        return check
    if not alike and abs(got) <= TIE:
        return replace(check, got=signed(got), verdict=TIED)
    return check.judged(signed(got), got > -TIE)


def gain(results: Results, kind: str) -> float | None:
    """What N = 16 gains over N = 1 with constant or selective B and C, in nats."""
    return gap(results, f"{KINDS[kind]}-n{STATES[0]}", f"{KINDS[kind]}-n{STATES[-1]}")


def state_check(results: Results) -> Check:
    """A larger state pays where B and C are selective."""
    words = f"language model: gain from N = {STATES[0]} to {STATES[-1]}, selective against constant B and C, nats"
    wanted = f"more than {TIE:g} and at least {STATE_RATIO:g} times (paper {paper_gain('selective'):.3f}, "
    check = Check(words, wanted + f"{paper_gain('constant'):.3f})")
    selective, constant = gain(results, "selective"), gain(results, "constant")
    if selective is None or constant is None:
        return check
    holds = selective > TIE and selective >= STATE_RATIO * constant
    return check.judged(f"{signed(selective)}, {signed(constant)}", holds)


def paper_gain(kind: str) -> float:
    """The paper's."""
    return paper_gap(PAPER_10[kind][STATES[0]], PAPER_10[kind][STATES[-1]])


# -------------------------------------------------------------------------------------------------------------- tables


def protocol(results: Results) -> str:
    """The settings in words."""
    parts = [copying_protocol(first(results, "copying-")), language_protocol(first(results, "lm-"))]
    paper = (
        "The paper: 350M parameters, 7B tokens of the Pile, contexts of 2048; its gaps are ln of ratios of perplexity."
    )
    return "\n\n".join(part for part in [*parts, CHOSEN.get(results.scale, ""), paper] if part)


def optimization_words(how: dict) -> str:
    """Steps, rates and decay in words."""
    return (
        f"{how['steps']:,} steps of {how['batch_size']}, AdamW, learning rate {how['learning_rate']:g} after "
        f"{how['warmup_steps']} steps of warm-up, {'half a cosine' if how['cosine'] else 'constant'}, weight decay "
        f"{how['weight_decay']:g}"
    )


def copying_protocol(record: Record | None) -> str:
    """Of selective copying."""
    if record is None:
        return ""
    settings = record.settings
    task, model = settings["copying"], settings["model"]
    return (
        f"Selective copying: {task['n_tokens']} tokens in noise of {task['n_noise']}, {model['n_layers']} blocks, "
        f"d_model {model['d_model']}; {optimization_words(settings['optimization'])}; {settings['validation_rows']} "
        "validation rows."
    )


def language_protocol(record: Record | None) -> str:
    """Of the language model."""
    if record is None:
        return ""
    settings, values = record.settings, record.values
    model, how, window = settings["model"], settings["optimization"], settings["window"]
    seen, judged = how["steps"] * how["batch_size"] * window, settings["validation_rows"] * window
    return (
        f"Language model: bytes of the standard library ({values['training_bytes']:,} to learn from, "
        f"{values['held_out_bytes']:,} in held-out files), {model['n_layers']} blocks, d_model {model['d_model']}; "
        f"windows of {window} bytes that each start without context; {optimization_words(how)}: {seen:,} bytes seen. "
        f"Judged on {settings['validation_rows']} fixed windows, {judged:,} bytes."
    )


def table_7(results: Results) -> str:
    """Accuracy of copying and loss of the language model by what is selective."""
    header = ("selective", "copying, %", "parameters", "nats a byte", "bits a byte", "above all", "paper", "paper, ppl")
    rows = []
    for name in SELECTIVE:
        arm = f"{name}-n16"
        copied, own = results.values(f"copying-{name}", "accuracy"), losses(results, arm)
        if copied or own:
            published = [signed(paper_gap(PAPER_7[name], PAPER_7["all"])), f"{PAPER_7[name]:.2f}"]
            ours = signed(gap(results, arm, "all-n16"))
            rows.append([WORDS[name], spread(copied, scale=100), *loss_cells(results, arm), ours, *published])
    note = "Parameters are the language model's; gaps are in nats, and positive where the loss is higher."
    return f"{table(header, rows)}\n\n{note}"


def loss_cells(results: Results, arm: str) -> list[str]:
    """Parameters, nats and bits a byte."""
    own, parameters = losses(results, arm), results.values(f"lm-{arm}", "parameters")
    return [f"{parameters[0]:,}" if parameters else "", spread(own, 3), spread(own, 3, 1 / LOG_2)]


def table_10(results: Results) -> str:
    """Loss by N, with constant and with selective B and C."""
    header = ("B and C", "N", "parameters", "nats a byte", "bits a byte", "below N = 1", "paper", "paper, ppl")
    rows = []
    for kind, name in KINDS.items():
        for n in STATES:
            arm = f"{name}-n{n}"
            if losses(results, arm):
                ours = signed(gap(results, f"{name}-n{STATES[0]}", arm))
                published = PAPER_10[kind]
                theirs = [signed(paper_gap(published[STATES[0]], published[n])), f"{published[n]:.2f}"]
                rows.append([kind, str(n), *loss_cells(results, arm), ours, *theirs])
    return table(header, rows)


# -------------------------------------------------------------------------------------------------------------- words


def transformer_words(results: Results) -> str:
    """Who is ahead, and by how much."""
    got = gap(results, TRANSFORMER, "all-n16")
    if got is None:
        return "Not measured beside Mamba yet, or one of the two diverged."
    cells = [loss_cells(results, arm) for arm in (TRANSFORMER, "all-n16")]
    words = "; ".join(
        f"{name}: {nats} nats, {bits} bits a byte, {parameters} parameters"
        for name, (parameters, nats, bits) in zip(("Transformer++", "Mamba"), cells, strict=True)
    )
    if abs(got) <= TIE:
        return f"{words}. The difference of {signed(got)} nats is a tie."
    if got < 0:
        return f"{words}. **Transformer++ wins by {-got:.3f} nats a byte.**"
    return f"{words}. Mamba is ahead by {got:.3f} nats a byte."


def remarks(results: Results) -> str:
    """What the numbers say, each sentence computed from them."""
    lines = [*gap_remarks(results), *order_remarks(results), *copying_remarks(results), *state_remarks(results)]
    lines += spread_remarks(results)
    lines += [f"{record.key} diverged: its loss is not finite." for record in results.records if diverged(record)]
    return "\n".join(f"- {line}" for line in lines) or "Too few arms are measured to compare any."


def diverged(record: Record) -> bool:
    """Whether its loss at the end is not finite."""
    return record.values["validation_loss"] is None


def gap_remarks(results: Results) -> list[str]:
    """From nothing to everything selective, beside the paper."""
    ours, paper = gap(results, "none-n16", "all-n16"), paper_gap(PAPER_7["none"], PAPER_7["all"])
    if ours is None:
        return []
    share = f"{100 * ours / paper:.0f} % of the paper's {paper:.3f}" if ours > 0 else f"the paper has {paper:+.3f}"
    return [f"Selecting everything instead of nothing gains {signed(ours)} nats a byte ({share} nats a token)."]


def order_remarks(results: Results) -> list[str]:
    """The order that came out, beside the paper's."""
    found = {name: loss(results, f"{name}-n16") for name in SELECTIVE}
    known = {name: value for name, value in found.items() if value is not None}
    if len(known) < len(SELECTIVE):
        return []
    ours = [WORDS[name] for name in sorted(known, key=lambda name: -known[name])]
    paper = [WORDS[name] for name in sorted(PAPER_7, key=lambda name: -PAPER_7[name])]
    same = "as in the paper" if ours == paper else f"the paper has {' > '.join(paper)}"
    return [f"Losses from the highest: {' > '.join(ours)} ({same}; those within {TIE:g} nats are ties)."]


def spread_remarks(results: Results) -> list[str]:
    """How far seeds of one Mamba lie apart: what that leaves of the gaps."""
    arms = {r.arm.removeprefix("lm-") for r in results.records if r.arm.startswith("lm-")} - {TRANSFORMER}
    spans = [max(own) - min(own) for arm in arms if len(own := losses(results, arm)) > 1 and isfinite(max(own))]
    if not spans:
        return []
    return [
        f"Seeds of one Mamba lie up to {max(spans):.3f} nats a byte apart: gaps between means that are not well above "
        "that are not told from chance by so few seeds."
    ]


def copying_remarks(results: Results) -> list[str]:
    """Which single selection solves selective copying."""
    found = {name: value for name in SELECTIVE if (value := accuracy(results, name)) is not None}
    solved = [WORDS[name] for name, value in found.items() if value >= SELECTIVE_AT_LEAST]
    if not found:
        return []
    limit = f"{100 * SELECTIVE_AT_LEAST:.0f} %"
    return [
        f"Selective copying reaches {limit} with these selective: {'; '.join(solved) or 'nothing of what was tried'}."
    ]


def state_remarks(results: Results) -> list[str]:
    """What N is worth in either half of table 10."""
    lines = []
    for kind in KINDS:
        ours = gain(results, kind)
        if ours is not None:
            tied = ", a tie" if abs(ours) <= TIE else ""
            lines.append(
                f"With {kind} B and C N = {STATES[-1]} gains {signed(ours)} nats a byte over N = {STATES[0]}{tied} "
                f"(paper {paper_gain(kind):+.3f} a token)."
            )
    return lines
